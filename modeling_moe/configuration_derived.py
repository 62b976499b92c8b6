# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a field of the configuration is where nobody chose it: the value that other fields imply.

A derived value is written into config.json as any other, since servers read it there. In a file it counts as derived if
it equals what the file's other fields imply; from then on it follows them.
"""

from collections.abc import Callable
from typing import Any

from .router_catalogue import router_class


# the fields that have one entry for each layer
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def _head_dim(config) -> int | None:
    """Width of a head; None where no whole number of it makes the hidden size, which `validate_moe` refuses."""
    if config.kv_lora_rank is not None:
        return config.qk_rope_head_dim
    width, rest = divmod(config.hidden_size, config.num_attention_heads)
    return None if rest else width


def _layer_types(config) -> list[str]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


# field -> its value where none was chosen; in an order in which each needs only those before it
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


def settle(config) -> None:
    """Fills the fields of a new configuration that are None, and remembers in `_derived` which ones are derived."""
    derived = []
    if config.kv_lora_rank is not None:
        config.__dict__["head_dim"] = None  # as in transformers: latent attention has the width that rotates
    for name, rule in DERIVED.items():
        value, chosen = rule(config), getattr(config, name)
        if chosen is None or chosen == value or (name == "shared_expert_intermediate_size" and not chosen):
            config.__dict__[name] = value
            derived.append(name)
    config.__dict__["_derived"] = tuple(derived)


def follow(config, changed: str) -> None:
    """Derives anew what follows from a field that was assigned, and remembers whether that field is chosen now."""
    derived = set(config._derived) - {changed}
    if changed in DERIVED and getattr(config, changed) is None:
        derived.add(changed)
    if changed == "num_hidden_layers":
        config.__dict__.update(first_layers(config.__dict__))
    if not config.use_sliding_window and changed == "use_sliding_window":
        config.__dict__["sliding_window"] = None
    config.__dict__["_derived"] = tuple(name for name in DERIVED if name in derived)
    for name in config._derived:
        config.__dict__[name] = DERIVED[name](config)


def first_layers(values: dict[str, Any]) -> dict[str, Any]:
    """The lists of a model's fields that name more layers than it has, cut to its first layers.

    A window goes too where the cut leaves no layer that has it.
    """
    layers, cut = values.get("num_hidden_layers"), {}
    if not isinstance(layers, int) or layers < 1:
        return {}
    for name in PER_LAYER:
        if isinstance(entries := values.get(name), list) and len(entries) > layers:
            cut[name] = entries[:layers]
            lost = name == "layer_types" and "sliding_attention" in entries
            if lost and "sliding_attention" not in cut[name]:
                cut["sliding_window"] = None
    return cut
