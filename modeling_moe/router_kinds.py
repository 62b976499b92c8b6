# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lists the kinds of routers that a model can have; each kind is measured and balanced by itself.

A routed module is one that has a router: a subclass of [`~modeling_moe.router_block.Routed`].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .configuration_fields import HAS_DEPTH


class RouterKind(NamedTuple):
    """A kind of routers, whose losses are averaged, and whose loads have one width.

    Attributes:
        gate: name of a router of this kind in its decoder layer, as the last parts of the router's qualified name.
        load: name of the model's output that has the load of the experts.
        logits: name of the model's output that has the router logits.
        view: takes the configuration, and returns it as the routers of this kind read it.
        per_layer: takes the configuration, and returns the most routers of this kind in a layer; 0 if the model has none.
        routed: takes a decoder layer, and returns the layer's routed modules of this kind.
    """

    gate: str
    load: str
    logits: str
    view: Callable[[Any], Any]
    per_layer: Callable[[Any], int]
    routed: Callable[[Any], list[Any]]


# a decoder layer returns the statistics of its routers in this order
KINDS: dict[str, RouterKind] = {
    "mlp": RouterKind(
        gate="mlp.gate",
        load="expert_load",
        logits="router_logits",
        view=lambda config: config,
        per_layer=lambda config: 1,
        routed=lambda layer: [layer.mlp] if layer.is_sparse else [],
    ),
    "attention": RouterKind(
        gate="self_attn.gate",
        load="attention_expert_load",
        logits="attention_router_logits",
        view=lambda config: config.attention_routing,
        per_layer=lambda config: int(config.routed_attention is not None),
        routed=lambda layer: [] if layer.self_attn.routed_attention is None else [layer.self_attn],
    ),
    "depth": RouterKind(
        gate="depth.gate",
        load="depth_load",
        logits="depth_router_logits",
        view=lambda config: config.depth_routing,
        per_layer=lambda config: int(HAS_DEPTH.holds(config)),
        routed=lambda layer: [] if layer.depth is None else [layer.depth],
    ),
}


def slots(config: Any) -> dict[str, int]:
    """Returns the number of statistics of each kind that every decoder layer returns, kinds without routers left out."""
    numbers = {kind: entry.per_layer(config) for kind, entry in KINDS.items()}
    return {kind: number for kind, number in numbers.items() if number}
