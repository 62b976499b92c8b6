# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module describes the routers of a model by its configuration: experts, scores, balance and capacity."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..attention_catalogue import ROUTED_ATTENTION
from ..configuration_derived import derived_fields
from ..configuration_fields import HAS_DEPTH, settings_of
from ..configuration_moe import MoEConfig
from ..configuration_unread import routers_in_use
from ..conversion import moe_config
from ..monitoring import SparseLayer, experts_per_token
from ..router import CAPACITY_READS, FRAME_READS, RouterFields
from ..router_assigned import AssignedFields
from ..router_balancing import BalancingFields
from ..router_capacity import CapacityFields
from ..router_carried import CarriedFields
from ..router_catalogue import CatalogueFields
from ..router_losses import LossFields
from ..router_soft import SoftFields
from ..router_topk import SELECTION_READS, TopKFields
from ..router_variable_k import VariableKFields, VariableRouter
from ..utils.errors import UserError
from .wording import markdown_text


LOSSES = {
    "router_aux_loss_coef": "load balance",
    "router_seq_aux_loss_coef": "load balance of each sequence",
    "router_z_loss_coef": "z-loss",
    "router_importance_loss_coef": "importance",
    "router_load_loss_coef": "load",
    "router_entropy_loss_coef": "entropy",
}
CONTROLLERS = {
    "bias": "a selection bias, moved by the sign of the imbalance after each step",
    "proportional": "a selection bias, moved in proportion to the imbalance after each step",
    "quantile": "a selection bias, set to the value at which the imbalance would vanish",
}
CAPACITY = {
    "capacity_factor": "in training {} times the balanced load of a sequence",
    "eval_capacity_factor": "in evaluation {} times the balanced load of a sequence",
    "expert_capacity": "{} tokens of a sequence",
}
GROUPS = (
    *(CatalogueFields, RouterFields, TopKFields, AssignedFields, VariableKFields, SoftFields, CarriedFields),
    *(CapacityFields, BalancingFields, LossFields),
)
# fields that a row of the table shows in words
TOLD = {
    *("router_type", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"),
    *("router_selection_bias", "router_controller", *LOSSES, *CAPACITY),
}
# fields that many routers read; a field outside this set tells a router from others, and is shown at any value
SHARED_READS = FRAME_READS | CAPACITY_READS | SELECTION_READS | {"num_null_experts", "num_copy_experts"}
# names in transformers' configurations of what a router does -> title
FOREIGN = {
    "scoring_func": "Scores",
    "score_function": "Scores",
    "norm_topk_prob": "Weights divided by their sum",
    "routed_scaling_factor": "Factor on the weights",
    "router_scaling_factor": "Factor on the weights",
    "n_group": "Groups of experts",
    "topk_group": "Groups that a token may use",
    "router_aux_loss_coef": "Weight of the load-balancing loss",
    "aux_loss_coef": "Weight of the load-balancing loss",
    "router_z_loss_coef": "Weight of the z-loss",
    "router_jitter_noise": "Jitter",
}
SHARED = ("num_shared_experts", "n_shared_experts", "moe_num_shared_experts")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size", "shared_experts_intermediate_size")


def router_rows(config: PreTrainedConfig, layers: Sequence[SparseLayer]) -> list[tuple[str, str]]:
    """Returns titles and texts of the table about the routers of a sparse model of any family.

    Args:
        config: the model's configuration.
        layers: the sparse layers that can be reached; they give the number of experts and the router's class.
    """
    own = _as_own(config)
    if own is None:
        return _foreign_rows(config, layers)
    # transformers' models compute their balance loss on demand
    condition = "" if isinstance(config, MoEConfig) else ", if `output_router_logits` is true"
    return _own_rows(own, condition)


def _as_own(config: PreTrainedConfig) -> MoEConfig | None:
    """Returns the equivalent configuration of this package, which describes a router completely; None if there is none."""
    try:
        return moe_config(config)
    except UserError:
        return None


def _network_rows(config: MoEConfig) -> list[tuple[str, str]]:
    rows = [
        ("Router", f"`{config.router_type}`{_scores(config)}"),
        ("Routed experts", f"{config.num_experts} of width {config.moe_intermediate_size:,}{_latent(config)}"),
        ("Experts per token", _per_token(config)),
    ]
    if config.has_shared_experts:
        rows.append(("Shared experts", _shared_experts(config)))
    return rows


def _has_gradient(config: MoEConfig) -> bool:
    """Returns whether a router of a model has a gradient, without which router losses are no part of the training loss."""
    routers = routers_in_use(config)
    if config.routed_attention is not None:
        routers.append(ROUTED_ATTENTION[config.routed_attention].router_class)
    return HAS_DEPTH.holds(config) or any(router.differentiable for router in routers)


def _own_rows(config: MoEConfig, condition: str) -> list[tuple[str, str]]:
    rows = _network_rows(config) if "sparse" in config.mlp_layer_types else []
    if (name := config.routed_attention) is not None:
        experts, top_k = config.attention_experts, config.attention_experts_per_tok
        rows.append(("Routed attention", f"`{name}`, {experts} experts in every layer, {top_k} per token"))
    if HAS_DEPTH.holds(config):
        routed = [str(index) for index in range(config.num_hidden_layers) if config.routes_depth(index)]
        share = f"about {100 * config.depth_capacity:g}\u00a0% of the tokens each, chosen by `{config.depth_router}`"
        rows.append(("Layers that process only some tokens", f"{', '.join(routed)} (from 0), {share}"))
    losses = [f"{name} {getattr(config, field):g}" for field, name in LOSSES.items() if getattr(config, field)]
    if not _has_gradient(config):
        losses = []
    rows.append(("Router losses in training, by weight", ", ".join(losses) + condition if losses else "none"))
    if config.router_controller is not None:
        rows.append(("Balance without a loss", CONTROLLERS[config.router_controller]))
    elif config.router_selection_bias:
        rows.append(("Balance without a loss", "a selection bias that training does not move"))
    limits = [text.format(f"{value:g}") for field, text in CAPACITY.items() if (value := getattr(config, field))]
    if limits:
        rows.append(("Capacity of an expert", ", ".join(limits)))
    elif config.router_type == "topk":
        # other routers, such as expert_choice, limit experts in their own ways
        rows.append(("Capacity of an expert", "no limit, no token is dropped"))
    if other := _other_settings(config):
        rows.append(("Other settings", ", ".join(f"`{name}={markdown_text(value)}`" for name, value in other.items())))
    return rows


def _read_by_routers(config: MoEConfig) -> frozenset[str]:
    return frozenset[str]().union(*(router.reads for router in routers_in_use(config)))


def _scores(config: MoEConfig) -> str:
    parts, read = [], _read_by_routers(config)
    if "scoring_func" in read:
        parts.append(f" on {config.scoring_func} scores")
    if "norm_topk_prob" in read and config.norm_topk_prob:
        parts.append("weights divided by their sum")
    if config.routed_scaling_factor != 1:
        parts.append(f"weights times {config.routed_scaling_factor:g}")
    if config.topk_group < config.n_group:
        parts.append(f"from {config.topk_group} of {config.n_group} groups of experts")
    return ", ".join(parts) if not parts or parts[0].startswith(" ") else f", {', '.join(parts)}"


def _per_token(config: MoEConfig) -> str:
    routers = routers_in_use(config)
    if all(router.uses_all_experts for router in routers):
        return f"all {config.num_experts}, in a weighted mean"
    if any(issubclass(router, VariableRouter) for router in routers):
        return f"varies from token to token (`num_experts_per_tok` is {config.num_experts_per_tok})"
    if config.num_null_experts or config.num_copy_experts:
        extra = config.num_null_experts + config.num_copy_experts
        return f"at most {config.num_experts_per_tok}, since {extra} more choices have no weights"
    return str(config.num_experts_per_tok)


def _latent(config: MoEConfig) -> str:
    return "" if config.moe_latent_size is None else f", on {config.moe_latent_size:,} latent features"


def _shared_experts(config: MoEConfig) -> str:
    gate = ", gated" if config.shared_expert_gate else ""
    gate += ", averaged with the routed ones" if config.shared_expert_combination_strategy == "average" else ""
    count = {0: "", 1: "1, "}.get(config.num_shared_experts, f"{config.num_shared_experts}, together ")
    return f"{count}of width {config.shared_expert_intermediate_size:,}{gate}"


def _other_settings(config: MoEConfig) -> dict[str, Any]:
    """Returns the fields of the routers that no row shows in words: the chosen ones, and those of this router alone.

    A configuration refuses fields that nothing reads, so each chosen field has an effect.
    """
    declared, own = settings_of(MoEConfig), _read_by_routers(config) - SHARED_READS
    hidden = TOLD | (set(derived_fields(config)) - own)
    fields = {item.name: item for group in GROUPS for item in dataclasses.fields(group) if item.name in declared}
    return {
        name: value
        for name, item in fields.items()
        if (value := getattr(config, name)) is not None
        and name not in hidden
        and (name in own or value not in (item.default, *declared[name].idle))
    }


def _foreign_rows(config: PreTrainedConfig, layers: Sequence[SparseLayer]) -> list[tuple[str, str]]:
    """Returns what a configuration of transformers says under names that several families share."""
    text: Any = config.get_text_config()
    rows = []
    if routers := sorted({type(layer.router).__name__ for layer in layers if layer.router is not None}):
        rows.append(("Router", ", ".join(f"`{name}` of transformers" for name in routers)))
    if experts := sorted({layer.num_experts for layer in layers}):
        rows.append(("Routed experts", " or ".join(map(str, experts))))
    if (top_k := experts_per_token(config)) is not None:
        rows.append(("Experts per token", str(top_k)))
    shared = next((value for name in SHARED if (value := getattr(text, name, None))), None)
    width = next((value for name in SHARED_WIDTHS if (value := getattr(text, name, None))), None)
    if isinstance(shared, int) or isinstance(width, int):
        of_width = f"of width {width:,}" if isinstance(width, int) else ""
        rows.append(("Shared experts", f"{shared or ''} {of_width}".strip()))
    for name, title in FOREIGN.items():
        value = getattr(text, name, None)
        if isinstance(value, bool | int | float | str) and value not in ("", 0.0):
            rows.append((title, markdown_text(value)))
    return rows
