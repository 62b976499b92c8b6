# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The model card: metadata, facts from the saved config.json, how the model was made, results, how to load it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..cli import UserError
from ..configuration_moe import MoEConfig
from ..modeling_moe import MODELS, MoEForCausalLM, MoEPreTrainedModel


TEMPLATE = Path(__file__).with_name("card.md.jinja")
MEASURES = {"loss": "Loss", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}
PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}


def write_model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    language: str | list[str] = "en",
    license: str = "apache-2.0",
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    upcycling: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    tags: Sequence[str] = ("moe", "modeling_moe"),
) -> ModelCard:
    """Writes `README.md` into the folder of a saved model. Needs no network.

    Args:
        folder: where `save_pretrained` wrote the model; the facts come from its `config.json`.
        repo_id: name on the Hub, for title and load snippet; the folder's name if not given.
        base_model: dense checkpoint(s) the model was made from. Names on the Hub become metadata, of a local path the
            card tells the last part.
        language: the card's metadata, as `license` and `tags`.
        license: identifier of the Hub.
        metrics: results of each domain, `{"wiki": {"loss": ..., "perplexity": ..., "bits_per_byte": ...}}`, any of the
            three; or before and after training, `{"wiki": {"before": {...}, "after": {...}}}`.
        upcycling: how the dense model became sparse, names and values to print.
        training: how the model was trained after that, names and values to print.
        tags: see `language`.

    Returns:
        The card as written.

    Raises:
        UserError: if the folder holds no MoE model, or a domain has none of the measures.
    """
    folder = Path(folder)
    config = _read_config(folder)
    name = repo_id or folder.resolve().name
    sources = [base_model] if isinstance(base_model, str) else list(base_model or [])
    results = _results(metrics or {})
    model_class = _model_class(config)
    total, active = _count_params(model_class, config)
    auto_class = str(model_class._auto_class)
    task = PIPELINES[auto_class]
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=list(tags),
        base_model=[source for source in sources if _is_hub_name(source)] or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=_eval_results(results, task) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        auto_class=auto_class,
        has_code=(folder / "modeling_moe.py").is_file(),
        facts=_facts(config, total, active),
        total=_short(total),
        active=_short(active),
        is_sparse=_sparse_layers(config) > 0,
        sources=[_printed(source) for source in sources],
        upcycling=_rows(upcycling),
        training=_rows(training),
        results=_table(results),
        compared=any("before" in stages for stages in results.values()),
    )
    card.save(folder / "README.md")
    return card


def _read_config(folder: Path) -> MoEConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json: save the model there before its card")
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type != MoEConfig.model_type:
        raise UserError(f"{file} has model_type {model_type!r}: the card is made for {MoEConfig.model_type!r}")
    return MoEConfig.from_pretrained(folder)


def _model_class(config: MoEConfig) -> type[MoEPreTrainedModel]:
    classes = {model.__name__: model for model in MODELS}
    return classes.get((config.architectures or [""])[0], MoEForCausalLM)


def _count_params(model_class: type[MoEPreTrainedModel], config: MoEConfig) -> tuple[int, int]:
    """Total and active parameters; the head may be another than the causal LM's, which the config counts."""
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in model_class(config).parameters())
    return total, total - (config.num_params() - config.num_active_params())


def _is_hub_name(name: str) -> bool:
    if Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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


def _results(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Domain -> `"before"` or `"after"` -> measure -> value, known measures only."""
    results = {}
    for domain, values in metrics.items():
        stages = values if {"before", "after"} & set(values) else {"after": values}
        results[domain] = {
            stage: {measure: float(stages[stage][measure]) for measure in MEASURES if measure in stages[stage]}
            for stage in ("before", "after")
            if stages.get(stage)
        }
        if not any(results[domain].values()):
            raise UserError(f"metrics of domain {domain!r} have none of {', '.join(MEASURES)}: give at least one")
    return results


def _eval_results(results: Mapping, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", domain),
            dataset_name=domain,
            metric_type=measure,
            metric_name=MEASURES[measure],
            metric_value=value,
        )
        for domain, stages in results.items()
        for measure, value in stages.get("after", {}).items()
    ]


def _table(results: Mapping) -> list[list[str]]:
    """Header and rows, one column for each measure and stage that some domain has."""
    used = [
        (measure, stage)
        for measure in MEASURES
        for stage in ("before", "after")
        if any(measure in stages.get(stage, {}) for stages in results.values())
    ]
    if not used:
        return []
    compared = any(stage == "before" for _, stage in used)
    header = ["Domain", *(MEASURES[measure] + (f", {stage}" if compared else "") for measure, stage in used)]
    rows = []
    for domain, stages in results.items():
        values = [stages.get(stage, {}).get(measure) for measure, stage in used]
        rows.append([_printed(domain), *("-" if value is None else f"{value:,.3f}" for value in values)])
    return [header, *rows]


def _rows(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [
        (_printed(name).replace("_", " ").capitalize(), _printed(value))
        for name, value in (values or {}).items()
        if value is not None and value not in ("", [], {}, ())
    ]


def _printed(value: Any) -> str:
    """A value as a table cell; of an absolute path the last part, since the rest is of no use to a reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_printed(key)}: {_printed(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_printed(item) for item in value if item is not None)
    text = str(value)
    if Path(text).is_absolute():
        text = Path(text).name
    return text.replace("|", "\\|").replace("\n", " ")
