# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module derives the facts of a model card from config.json and the names of the parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..configuration_moe import MoEConfig
from ..modeling_moe import MODELS, MoEForCausalLM, MoEPreTrainedModel
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.loading import load_config
from .wording import markdown_text


PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model or adapter that the template of a card uses.

    Attributes:
        auto_class: name of the transformers auto class that loads the model.
        task: the Hub's name of the task.
        library: the library that loads the model, `transformers` or `peft`.
        facts: titles and texts of a table.
        total: number of parameters, as short text; None for an adapter.
        active: number of parameters that a token uses, as short text; None if not known.
        is_sparse: whether the model has sparse layers.
        model_type: model type of a model that is not of this package, else None.
        is_adapter: whether it is a LoRA adapter.
    """

    auto_class: str
    task: str
    library: str
    facts: list[tuple[str, str]]
    total: str | None = None
    active: str | None = None
    is_sparse: bool = False
    model_type: str | None = None
    is_adapter: bool = False


def model_facts(folder: Path, trust_remote_code: bool = False) -> ModelFacts:
    """Returns the facts about a saved model or adapter, read only from the folder.

    Args:
        folder: folder of a model of this package, of a causal LM of transformers, or of a LoRA adapter.
        trust_remote_code: whether code that the folder brings may read the configuration.

    Raises:
        UserError: if the folder holds neither a model nor an adapter, or a configuration is damaged.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _adapter_facts(read_json(folder / "adapter_config.json"))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: save the model there before its card")
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    return _moe_facts(config) if isinstance(config, MoEConfig) else _transformers_facts(config, trust_remote_code)


def _moe_facts(config: MoEConfig) -> ModelFacts:
    model_class = _model_class(config)
    total, active = _count_params(model_class, config)
    auto_class = str(model_class._auto_class)
    return ModelFacts(
        auto_class=auto_class,
        task=PIPELINES[auto_class],
        library="transformers",
        facts=_facts(config, total, active),
        total=_short(total),
        active=_short(active),
        is_sparse=_sparse_layers(config) > 0,
    )


def _transformers_facts(config: PreTrainedConfig, trust_remote_code: bool) -> ModelFacts:
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
    return ModelFacts(
        auto_class="AutoModelForCausalLM",
        task=PIPELINES["AutoModelForCausalLM"],
        library="transformers",
        facts=list(facts.items()),
        total=_short(total),
        is_sparse="Experts per token" in facts,
        model_type=config.model_type,
    )


def _adapter_facts(config: dict[str, Any]) -> ModelFacts:
    facts = [("Method", config.get("peft_type")), ("Rank", config.get("r")), ("Alpha", config.get("lora_alpha"))]
    for title, name in (
        ("Layers", "target_modules"),
        ("Parameters", "target_parameters"),
        ("Trained whole", "modules_to_save"),
    ):
        value = config.get(name)
        facts.append((title, sorted(map(str, value)) if isinstance(value, list) else value))
    return ModelFacts(
        auto_class="AutoModelForCausalLM",
        task=PIPELINES["AutoModelForCausalLM"],
        library="peft",
        facts=[(title, markdown_text(value)) for title, value in facts if value],
        is_adapter=True,
    )


def has_chat_template(folder: Path) -> bool:
    """Returns whether the tokenizer in a folder has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("chat_template"))


def _model_class(config: MoEConfig) -> type[MoEPreTrainedModel]:
    """Returns the class of this package that config.json names; the causal LM if it names none."""
    classes = {model.__name__: model for model in MODELS}
    named = config.architectures if isinstance(config.architectures, list) else []
    return next((classes[name] for name in named if isinstance(name, str) and name in classes), MoEForCausalLM)


def _count_params(model_class: type[MoEPreTrainedModel], config: MoEConfig) -> tuple[int, int]:
    """Returns total and active parameters of a model with any head; the config counts those of the causal LM."""
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in model_class(config).parameters())
    return total, total - (config.num_params() - config.num_active_params())


def _short(count: int) -> str:
    """Returns a number as short text: `46702792704` as `46.7B`."""
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
