# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The catalogue: what `router_type` may be. A router of one's own is added to it by its name."""

from collections.abc import Callable

from .router import Router
from .router_assigned import HashRouter, MMoERouter, ScoredHashRouter, TaskRouter, UniformRouter
from .router_batch import BaseLayerRouter, ExpertChoiceRouter, ExpertThresholdRouter, SinkhornRouter
from .router_soft import LoryRouter, SoftRouter
from .router_topk import (
    GShardRouter,
    GumbelTopKRouter,
    HierarchicalRouter,
    NoisyTopKRouter,
    SparseMixerRouter,
    TopKRouter,
)
from .router_variable_k import ContinuousRouter, ReLURouter, TopPRouter


# router_type -> class
ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "noisy_topk": NoisyTopKRouter,
    "gumbel_topk": GumbelTopKRouter,
    "gshard": GShardRouter,
    "sparsemixer": SparseMixerRouter,
    "hierarchical": HierarchicalRouter,
    "hash": HashRouter,
    "hash_scored": ScoredHashRouter,
    "task": TaskRouter,
    "task_gate": MMoERouter,
    "fixed": UniformRouter,
    "top_p": TopPRouter,
    "continuous": ContinuousRouter,
    "relu": ReLURouter,
    "expert_choice": ExpertChoiceRouter,
    "expert_threshold": ExpertThresholdRouter,
    "sinkhorn": SinkhornRouter,
    "base": BaseLayerRouter,
    "soft": SoftRouter,
    "segment": LoryRouter,
}
# router_type -> what imports the class, in a checkpoint that brings the code of a router of its author's own
OWN_ROUTERS: dict[str, Callable[[], type[Router]]] = {}


def router_class(config, layer_idx: int | None = None) -> type[Router]:
    """The router of a sparse layer (None: of those that are not among the first `num_hash_layers`).

    Raises:
        ValueError: for a `router_type` that is not in the catalogue.
    """
    name = "sparsemixer" if config.router_gradient == "sparsemixer" else config.router_type
    if layer_idx is not None and layer_idx < config.num_hash_layers:
        name = "hash_scored"
    if name in OWN_ROUTERS and name not in ROUTERS:
        ROUTERS[name] = OWN_ROUTERS[name]()
    if name not in ROUTERS:
        raise ValueError(
            f"router_type {name!r} is unknown: choose one of {', '.join(ROUTERS)}; if it is yours, import what registers it "
            "in ROUTERS, or run the code that a checkpoint brings by modeling_moe.checkpoint_code.import_own_router(folder)."
        )
    return ROUTERS[name]
