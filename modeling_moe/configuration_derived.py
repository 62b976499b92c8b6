# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module fills the fields that nobody chose with the values that other fields imply.

A derived value is written into config.json like any other, because servers read it there. A value in a file counts as
derived if it equals what the other fields of the file imply; it then follows those fields when they change.
"""

from collections.abc import Callable
from typing import Any

from .router_catalogue import router_class


# the fields that have one entry for each layer
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "depth_layers")


def _head_dim(config: Any) -> int | None:
    """Returns the features of a head; None if hidden_size is not a multiple of the heads, which `check_model` refuses."""
    if config.kv_lora_rank is not None:
        return config.qk_rope_head_dim
    width, rest = divmod(config.hidden_size, config.num_attention_heads)
    return None if rest else width


def _layer_types(config: Any) -> list[str]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


# field -> the value that other fields imply; a field comes after the fields that it follows from
DERIVED: dict[str, Callable[[Any], Any]] = {
    "num_key_value_heads": lambda config: config.num_attention_heads,
    "head_dim": _head_dim,
    "layer_types": _layer_types,
    "mlp_layer_types": lambda config: ["sparse"] * config.num_hidden_layers,
    "moe_intermediate_size": lambda config: config.intermediate_size,
    "gated_experts": lambda config: config.gated_mlp,
    "shared_expert_intermediate_size": lambda config: config.num_shared_experts * config.moe_intermediate_size,
    "norm_topk_prob": lambda config: router_class(config).norm_topk_prob_default,
    "router_controller": lambda config: "bias" if config.router_bias_update_rate else None,
    "expected_experts_per_tok": lambda config: config.num_experts_per_tok,
}


def derived_fields(config: Any) -> tuple[str, ...]:
    """Returns the names of the fields of a configuration whose values follow from other fields."""
    return config.__dict__["_derived"]


def settle(config: Any) -> None:
    """Fills the fields of a new configuration that are None, and records which fields are derived."""
    derived = []
    if config.kv_lora_rank is not None:
        config.__dict__["head_dim"] = None  # transformers saves another head_dim for latent attention
    for name, rule in DERIVED.items():
        value, chosen = rule(config), getattr(config, name)
        if chosen is None or chosen == value or (name == "shared_expert_intermediate_size" and not chosen):
            config.__dict__[name] = value
            derived.append(name)
    config.__dict__["_derived"] = tuple(derived)


def follow(config: Any, changed: str) -> None:
    """Derives the fields that follow from a field that was assigned, and records whether that field is derived now."""
    derived = set(derived_fields(config)) - {changed}
    if changed in DERIVED and getattr(config, changed) is None:
        derived.add(changed)
    if changed == "num_hidden_layers":
        config.__dict__.update(first_layers(config.__dict__))
    if not config.use_sliding_window and changed == "use_sliding_window":
        config.__dict__["sliding_window"] = None
    ordered = tuple(name for name in DERIVED if name in derived)
    config.__dict__["_derived"] = ordered
    for name in ordered:
        config.__dict__[name] = DERIVED[name](config)


def chosen_values(config: Any) -> dict[str, Any]:
    """Returns what a new configuration equal to `config` needs as arguments: the saved values without derived fields."""
    values = {name: value for name, value in config.to_dict().items() if name not in derived_fields(config)}
    implementations = ("attn_implementation", "experts_implementation")
    given = {name: getattr(config, f"_{name}") for name in implementations}
    return values | {name: value for name, value in given.items() if value is not None}


def first_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the lists of `values` that name more layers than `num_hidden_layers`, cut to the first layers.

    The result also unsets `sliding_window` if the cut leaves no layer that has a window.
    """
    layers = values.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        return {}
    cut: dict[str, Any] = {}
    for name in PER_LAYER:
        if isinstance(entries := values.get(name), list) and len(entries) > layers:
            cut[name] = entries[:layers]
            lost = name == "layer_types" and "sliding_attention" in entries
            if lost and "sliding_attention" not in cut[name]:
                cut["sliding_window"] = None
    return cut
