# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The facts of a model card: what config.json and the names of the parameters tell of a model or an adapter."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..configuration_moe import MoEConfig
from ..modeling_moe import MODELS, MoEForCausalLM, MoEPreTrainedModel
from ..utils.errors import UserError
from ..utils.loading import load_config
from ..utils.locations import read_json
from .wording import printed


PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}


def describe(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """What the template of a card is told of a saved model or adapter, read from its folder alone.

    Args:
        folder: of a model of this package, of a causal LM of transformers, or of a LoRA adapter.
        trust_remote_code: whether the configuration may be read by code that the folder brings.

    Returns:
        `auto_class`, `task`, `total`, `active`, `is_sparse`, `facts` (rows of a table), `library`, `format` (the model type
        where it is not ours) and `adapter` (whether it is one).

    Raises:
        UserError: if the folder holds neither, or a configuration is damaged.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _adapter(read_json(folder / "adapter_config.json"))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: save the model there before its card")
    if read_json(folder / "config.json").get("model_type") == MoEConfig.model_type:
        return _own_model(MoEConfig.from_pretrained(folder))
    return _other_model(load_config(str(folder), trust_remote_code=trust_remote_code), trust_remote_code)


def _own_model(config: MoEConfig) -> dict[str, Any]:
    model_class = _model_class(config)
    total, active = _count_params(model_class, config)
    auto_class = str(model_class._auto_class)
    return {
        "auto_class": auto_class,
        "task": PIPELINES[auto_class],
        "total": _short(total),
        "active": _short(active),
        "is_sparse": _sparse_layers(config) > 0,
        "facts": _facts(config, total, active),
        "library": "transformers",
        "format": None,
        "adapter": False,
    }


def _other_model(config: PreTrainedConfig, trust_remote_code: bool) -> dict[str, Any]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    total = sum(parameter.numel() for parameter in model.parameters())
    names = {
        "num_hidden_layers": "Layers",
        "num_experts": "Routed experts",
        "num_local_experts": "Routed experts",
        "num_experts_per_tok": "Experts per token",
        "hidden_size": "Hidden size",
        "max_position_embeddings": "Context in tokens",
    }
    values = {title: getattr(config, name, None) for name, title in names.items()}
    facts = {title: f"{value:,}" for title, value in values.items() if isinstance(value, int) and value}
    facts |= {"Total parameters": f"{total:,}"}
    if config.dtype is not None:
        facts["Data type"] = str(config.dtype).removeprefix("torch.")
    return {
        "auto_class": "AutoModelForCausalLM",
        "task": PIPELINES["AutoModelForCausalLM"],
        "total": _short(total),
        "active": None,
        "is_sparse": "Experts per token" in facts,
        "facts": list(facts.items()),
        "library": "transformers",
        "format": config.model_type,
        "adapter": False,
    }


def _adapter(config: dict[str, Any]) -> dict[str, Any]:
    facts = [("Method", config.get("peft_type")), ("Rank", config.get("r")), ("Alpha", config.get("lora_alpha"))]
    for title, name in (
        ("Layers", "target_modules"),
        ("Parameters", "target_parameters"),
        ("Trained whole", "modules_to_save"),
    ):
        value = config.get(name)
        facts.append((title, sorted(map(str, value)) if isinstance(value, list) else value))
    return {
        "auto_class": "AutoModelForCausalLM",
        "task": PIPELINES["AutoModelForCausalLM"],
        "total": None,
        "active": None,
        "is_sparse": False,
        "facts": [(title, printed(value)) for title, value in facts if value],
        "library": "peft",
        "format": None,
        "adapter": True,
    }


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("chat_template"))


def _model_class(config: MoEConfig) -> type[MoEPreTrainedModel]:
    classes = {model.__name__: model for model in MODELS}
    named = config.architectures if isinstance(config.architectures, list) else []
    return next((classes[name] for name in named if isinstance(name, str) and name in classes), MoEForCausalLM)


def _count_params(model_class: type[MoEPreTrainedModel], config: MoEConfig) -> tuple[int, int]:
    """Total and active parameters; the head may be another than the causal LM's, which the config counts."""
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in model_class(config).parameters())
    return total, total - (config.num_params() - config.num_active_params())


def _short(count: int) -> str:
    """`46702792704` as `46.7B`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _sparse_layers(config: MoEConfig) -> int:
    return config.num_hidden_layers - len(config.mlp_only_layers)


def _facts(config: MoEConfig, total: int, active: int) -> list[tuple[str, str]]:
    sparse = _sparse_layers(config)
    facts = [("Layers", f"{config.num_hidden_layers}, of which {sparse} sparse")]
    if sparse:
        facts += [
            ("Routed experts", f"{config.num_experts}, width {config.moe_intermediate_size:,}"),
            ("Experts per token", str(config.num_experts_per_tok)),
        ]
        if config.has_shared_experts:
            facts.append(("Shared experts", _shared_experts(config)))
        facts.append(("Router", _router(config)))
        losses = {"load balance": config.router_aux_loss_coef, "z-loss": config.router_z_loss_coef}
        if any(losses.values()):
            weights = ", ".join(f"{loss} {weight:g}" for loss, weight in losses.items() if weight)
            facts.append(("Router losses in training", weights))
    facts += [
        ("Total parameters", f"{total:,}"),
        ("Active parameters per token", f"{active:,}"),
        ("Hidden size", f"{config.hidden_size:,}"),
        ("Context", f"{config.max_position_embeddings:,} tokens"),
    ]
    if config.dtype is not None:
        facts.append(("Data type", str(config.dtype).removeprefix("torch.")))
    return facts


def _shared_experts(config: MoEConfig) -> str:
    gate = ", gated" if config.shared_expert_gate else ""
    count = {0: "", 1: "1, "}.get(config.num_shared_experts, f"{config.num_shared_experts}, together of ")
    return f"{count}width {config.shared_expert_intermediate_size:,}{gate}"


def _router(config: MoEConfig) -> str:
    parts = [f"`{config.router_type}` on {config.scoring_func} scores"]
    if config.norm_topk_prob:
        parts.append("weights divided by their sum")
    if config.routed_scaling_factor != 1:
        parts.append(f"scaled by {config.routed_scaling_factor:g}")
    if config.n_group > 1:
        parts.append(f"{config.topk_group} of {config.n_group} groups")
    if config.router_selection_bias:
        parts.append("bias on the selection")
    return ", ".join(parts)
