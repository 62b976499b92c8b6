# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes docs/config.md from the metadata of the configuration fields.

python -m modeling_moe.utils.config_page docs/config.md
"""

import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from ..attention import AttentionFields
from ..attention_catalogue import RoutedAttentionFields
from ..attention_latent import LatentAttentionFields
from ..attention_moh import MixtureOfHeadsFields
from ..attention_rope import RopeFields
from ..attention_routing_transformer import RoutingTransformerFields
from ..attention_switch_head import SwitchHeadFields
from ..configuration_fields import Setting, settings_of, type_name
from ..configuration_model import ExpertFields, ModelFields
from ..configuration_moe import MoEConfig
from ..model_depth import DepthFields
from ..model_embeddings import EmbeddingFields
from ..model_norms import NormFields
from ..router import RouterFields
from ..router_assigned import AssignedFields
from ..router_balancing import BalancingFields
from ..router_capacity import CapacityFields
from ..router_carried import CarriedFields
from ..router_catalogue import ROUTERS, CatalogueFields
from ..router_losses import LossFields
from ..router_soft import SoftFields
from ..router_topk import TopKFields
from ..router_variable_k import VariableKFields


INTRODUCTION = """# Configuration

`MoEConfig` has the fields below. This page is generated from the metadata of the fields
(`python -m modeling_moe.utils.config_page docs/config.md`); a test fails if it is out of date.

- **Default.** The value of a field that is not given. `= ...` means that the field is computed from other fields and follows
  them when they change, unless you give a value.
- **Effect.** `logits`: the field changes what the model computes in evaluation. `training`: it changes training or the form of
  outputs only. `detail`: it refines a feature that another field switches on.
- **To use it.** The other fields that must be set so that something reads the field. A field that differs from its default
  although nothing reads it is refused, and the message names the field and the remedy.
"""
# group -> heading, in the order of the page
TITLES: dict[type, str] = {
    ModelFields: "Model",
    EmbeddingFields: "Embeddings",
    RopeFields: "Rotary embedding",
    NormFields: "Norms",
    AttentionFields: "Attention",
    LatentAttentionFields: "Latent attention",
    RoutedAttentionFields: "Routed attention",
    SwitchHeadFields: "Routed attention: SwitchHead",
    MixtureOfHeadsFields: "Routed attention: mixture of heads",
    RoutingTransformerFields: "Routed attention: Routing Transformer",
    DepthFields: "Mixture-of-Depths",
    ExpertFields: "Experts",
    CatalogueFields: "Router type",
    RouterFields: "Router",
    TopKFields: "Top-k routers",
    AssignedFields: "Routers by token id or task",
    CarriedFields: "Routers that read the layer before",
    VariableKFields: "Routers with a variable number of experts per token",
    SoftFields: "Soft routers",
    CapacityFields: "Capacity",
    BalancingFields: "Balancing without gradient",
    LossFields: "Router losses",
}
EFFECTS = {"function": "logits", "training": "training", "detail": "detail"}
# catalogues with more names than a cell can hold
LONG = {"hidden_act": "a key of transformers' `ACT2FN`"}


def page() -> str:
    """Returns the text of docs/config.md."""
    return INTRODUCTION + "".join(_section(group) for group in TITLES)


def _section(group: type) -> str:
    declared = settings_of(MoEConfig)
    header = "| Field | Type | Default | Range | Effect | Meaning |\n|---|---|---|---|---|---|\n"
    rows = [_row(item, declared[item.name]) for item in fields(group)]
    module = group.__module__.rpartition(".")[2]
    return f"\n## {TITLES[group]}\n\nDeclared in `modeling_moe/{module}.py`.\n\n{header}" + "".join(rows)


def _row(item: Field[Any], declared: Setting) -> str:
    default = repr(item.default) if declared.follows is None else f"= {declared.follows}"
    meaning = declared.help
    if remedies := _remedies(item.name, declared):
        meaning += f" **To use it:** {remedies}."
    kind = type_name(item.type)
    if declared.follows is not None:
        kind = kind.removesuffix(" | None")
    cells = [
        f"`{item.name}`",
        f"`{kind}`",
        f"`{default}`",
        _values(item.name, declared),
        EFFECTS[declared.effect],
        meaning,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _values(name: str, declared: Setting) -> str:
    if declared.choices is not None:
        return LONG.get(name, ", ".join(f"`{choice}`" for choice in declared.choices))
    return "" if declared.limits is None else str(declared.limits)


def _remedies(name: str, declared: Setting) -> str:
    """Returns what other fields must be so that something reads a field; empty if it is always read."""
    parts = [condition.remedy for condition in declared.conditions]
    if declared.by_router:
        reading = [kind for kind, router in ROUTERS.items() if name in router.reads]
        others = [kind for kind in ROUTERS if kind not in reading]
        if len(reading) <= len(others):
            parts.insert(0, f"choose `router_type` {_listed(reading)}")
        elif others:
            parts.insert(0, f"choose another `router_type` than {_listed(others)}")
    return " and ".join(parts)


def _listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
