# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module derives the facts of a model card from the configuration of a model, or from the files of an adapter."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..configuration_moe import MoEConfig
from ..conversion import Server, Verdict
from ..modeling_moe import MODELS, MoEForCausalLM, MoEPreTrainedModel
from ..monitoring import SparseLayer, UnreachableRouting, experts_per_token, sparse_layers
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.loading import load_config
from .parameters import count_parameters
from .router_facts import router_rows
from .serving import exports, servers, unfit_servers
from .wording import markdown_text


PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
SIZES = {
    "hidden_size": "Hidden size",
    "max_position_embeddings": "Context in tokens",
    "vocab_size": "Vocabulary",
}


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model or adapter that the template of a card uses.

    Attributes:
        auto_class: name of the transformers auto class that loads the model.
        task: the Hub's name of the task.
        library: the library that loads the model, `transformers` or `peft`.
        facts: titles and texts of a table.
        router: titles and texts of a table about the routers; empty for a dense model and an adapter.
        total: number of parameters, as short text; None for an adapter.
        active: number of parameters that a token uses, as short text; None if not known.
        is_sparse: whether the model, or the base model of an adapter as far as the adapter shows, has sparse layers.
        model_type: model type of a model that is not of this package, else None.
        is_adapter: whether it is a LoRA adapter.
        base_model_type: model type of an adapter's base model, if its folder is there.
        servers: the servers that compute the model as it is.
        unfit_servers: the servers that were tried with the model's format and do not compute the model, with the reasons.
        exports: formats to which the model can be exported, and the servers of each.
    """

    auto_class: str
    task: str
    library: str
    facts: list[tuple[str, str]]
    router: list[tuple[str, str]] = field(default_factory=list)
    total: str | None = None
    active: str | None = None
    is_sparse: bool = False
    model_type: str | None = None
    is_adapter: bool = False
    base_model_type: str | None = None
    servers: list[Server] = field(default_factory=list)
    unfit_servers: list[Verdict] = field(default_factory=list)
    exports: dict[str, list[Server]] = field(default_factory=dict)


def model_facts(folder: Path, trust_remote_code: bool = False) -> ModelFacts:
    """Returns the facts about a saved model or adapter, read only from the folder.

    Args:
        folder: folder of a model of this package, of a causal LM of transformers, or of a LoRA adapter.
        trust_remote_code: whether code that the folder brings may read the configuration.

    Raises:
        UserError: if the folder holds neither a model nor an adapter, a configuration is damaged, or the model is no causal LM.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _adapter_facts(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: save the model there before its card")
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in code:
        raise UserError(
            f"{folder} holds a model of type {config.model_type}, which transformers does not load as a causal language model: "
            "only such models get a card, write this one yourself"
        )
    with torch.device("meta"):
        if isinstance(config, MoEConfig):
            model: PreTrainedModel = _model_class(config)(config)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return _facts(config, model)


def _facts(config: PreTrainedConfig, model: PreTrainedModel) -> ModelFacts:
    own = isinstance(config, MoEConfig)
    auto_class = str(type(model)._auto_class) if isinstance(model, MoEPreTrainedModel) else "AutoModelForCausalLM"
    layers = _reached_layers(model)
    routed_attention = getattr(config, "routed_attention", None) is not None
    is_sparse = bool(layers) or routed_attention or (not own and experts_per_token(config) is not None)
    counts = count_parameters(model, layers)
    generates = auto_class == "AutoModelForCausalLM"
    return ModelFacts(
        auto_class=auto_class,
        task=PIPELINES[auto_class],
        library="transformers",
        facts=[*counts.rows(), *_shape(config, layers)],
        router=router_rows(config, layers) if is_sparse else [],
        total=short(counts.total),
        active=short(counts.active) if counts.active is not None else None,
        is_sparse=is_sparse,
        model_type=None if own else config.model_type,
        servers=servers(config) if generates else [],
        unfit_servers=unfit_servers(config) if generates else [],
        exports=exports(config) if generates else {},
    )


def _reached_layers(model: PreTrainedModel) -> list[SparseLayer]:
    try:
        return sparse_layers(model)
    except UnreachableRouting:
        return []


def _shape(config: PreTrainedConfig, layers: Sequence[SparseLayer]) -> list[tuple[str, str]]:
    text: Any = config.get_text_config()
    facts = []
    if isinstance(number := getattr(text, "num_hidden_layers", None), int):
        sparse = len({layer.layer for layer in layers})
        facts.append(("Layers", f"{number}, of which {sparse} sparse" if layers else str(number)))
    for name, title in SIZES.items():
        if isinstance(value := getattr(text, name, None), int) and value:
            facts.append((title, f"{value:,}"))
    if config.dtype is not None:
        facts.append(("Data type", str(config.dtype).removeprefix("torch.")))
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method"):
        facts.append(("Quantization of the weights", markdown_text(quantization["quant_method"])))
    return facts


def _adapter_facts(folder: Path) -> ModelFacts:
    config = read_json(folder / "adapter_config.json")
    facts: list[tuple[str, Any]] = [("Method", config.get("peft_type")), ("Rank", config.get("r"))]
    facts.append(("Alpha", config.get("lora_alpha")))
    for title, name in (
        ("Adapted layers", "target_modules"),
        ("Adapted parameters", "target_parameters"),
        ("Trained whole", "modules_to_save"),
    ):
        value = config.get(name)
        facts.append((title, sorted(map(str, value)) if isinstance(value, list) else value))
    if size := _adapter_size(folder):
        facts.append(("Parameters of the adapter", f"{size:,}"))
    base_model_type = _base_model_type(config.get("base_model_name_or_path"))
    adapted = f"{config.get('target_modules')} {config.get('target_parameters')}"
    return ModelFacts(
        auto_class="AutoModelForCausalLM",
        task=PIPELINES["AutoModelForCausalLM"],
        library="peft",
        facts=[(title, markdown_text(value)) for title, value in facts if value],
        is_sparse=base_model_type == MoEConfig.model_type or "experts" in adapted,
        is_adapter=True,
        base_model_type=base_model_type,
    )


def _adapter_size(folder: Path) -> int:
    """Returns the number of parameters in an adapter's file; 0 if it cannot be read, which a push refuses elsewhere."""
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except (OSError, SafetensorError):
        return 0
    return sum(torch.Size(shape).numel() for shape in shapes)


def _base_model_type(base: object) -> str | None:
    """Returns the model type in the folder of an adapter's base model; None if there is no readable folder."""
    if not isinstance(base, str) or not os.path.isfile(os.path.join(base, "config.json")):
        return None
    try:
        model_type = read_json(Path(base) / "config.json").get("model_type")
    except UserError:
        return None
    return model_type if isinstance(model_type, str) else None


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


def short(count: int) -> str:
    """Returns a number as short text: `46702792704` as `46.7B`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
