# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lists the routers by the names that `router_type` can have; a custom router is added to `ROUTERS`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from .configuration_fields import SPARSE, Condition, Range, setting
from .router import Router
from .router_assigned import HashRouter, MMoERouter, ScoredHashRouter, TaskRouter, UniformRouter
from .router_batch import BaseLayerRouter, ExpertChoiceRouter, ExpertThresholdRouter, SinkhornRouter
from .router_carried import DagRouter, ZayaRouter
from .router_soft import LoryRouter, SoftMoERouter
from .router_topk import (
    GShardRouter,
    GumbelTopKRouter,
    HierarchicalRouter,
    NoisyTopKRouter,
    SparseMixerRouter,
    TopKRouter,
)
from .router_variable_k import ContinuousRouter, ReMoERouter, TopPRouter


logger = logging.get_logger(__name__)

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
    "mmoe": MMoERouter,
    "uniform": UniformRouter,
    "top_p": TopPRouter,
    "continuous": ContinuousRouter,
    "remoe": ReMoERouter,
    "expert_choice": ExpertChoiceRouter,
    "expert_threshold": ExpertThresholdRouter,
    "sinkhorn": SinkhornRouter,
    "base_layer": BaseLayerRouter,
    "soft_moe": SoftMoERouter,
    "lory": LoryRouter,
    "dag": DagRouter,
    "zaya": ZayaRouter,
}
# router_type -> function that imports the class; a checkpoint with the code of a custom router adds to it
OWN_ROUTERS: dict[str, Callable[[], type[Router]]] = {}


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class CatalogueFields:
    """These fields determine which router the layers use."""

    router_type: str = setting(
        "topk",
        "The name of the router in modeling_moe.router_catalogue.ROUTERS; the class of each router cites paper and equation.",
        choices=ROUTERS,
        conditions=(SPARSE,),
    )
    num_hash_layers: int = setting(
        0,
        "The number of first layers whose routers are hash_scored instead of router_type (DeepSeek-V4).",
        Range(0, 10_000),
        conditions=(
            Condition(
                lambda config: "sparse" in config.mlp_layer_types[: config.num_hash_layers],
                "let mlp_layer_types have a sparse layer among the first num_hash_layers",
            ),
            Condition(
                lambda config: config.router_type != "hash_scored", "choose another router_type than 'hash_scored'"
            ),
        ),
    )


# field -> name that versions before 0.4.0 gave a value -> name of the value now
RENAMED_VALUES: dict[str, dict[str, str]] = {
    "router_type": {
        "task_gate": "mmoe",
        "fixed": "uniform",
        "relu": "remoe",
        "base": "base_layer",
        "soft": "soft_moe",
        "segment": "lory",
    },
    "router_controller": {"pid": "proportional"},
}


def current_value(field: str, value: Any) -> Any:
    """Returns the present name of a field's value, and warns once if `value` is a name from before version 0.4.0.

    A router that somebody has registered in `ROUTERS` under an old name keeps that name.
    """
    renamed = RENAMED_VALUES.get(field, {})
    if not isinstance(value, str) or value not in renamed or value in ROUTERS or value in OWN_ROUTERS:
        return value
    logger.warning_once(f"{field}={value!r} is an old name: write {field}={renamed[value]!r}.")
    return renamed[value]


def divide_old_coefficient(config: Any) -> None:
    """Gives `router_aux_loss_coef` of a configuration from before version 0.4.0 its present meaning, and warns.

    The load-balancing loss was normalised then: 1 in balance. It is transformers' now: K in balance, or E for routers in
    which each token uses all experts.
    """
    if config.router_aux_loss_coef == 0 or "sparse" not in config.mlp_layer_types:
        return
    router, old = router_class(config), config.router_aux_loss_coef
    field = "num_experts" if router.uses_all_experts else "num_experts_per_tok"
    config.router_aux_loss_coef = old / getattr(config, field)
    logger.warning_once(
        f"router_aux_loss_coef={old} was saved by modeling_moe before 0.4.0 and is read as {config.router_aux_loss_coef:g}, "
        f"{old} / {field}, so that training goes on as before: it has transformers' meaning now."
    )


def router_class(config: Any, layer_idx: int | None = None) -> type[Router]:
    """Returns the router class of a sparse layer.

    Args:
        config: the model's configuration.
        layer_idx: index of the layer; None for a layer that is not among the first `num_hash_layers`.

    Raises:
        ValueError: if no router has the name `router_type`.
    """
    name = "sparsemixer" if config.router_gradient == "sparsemixer" else config.router_type
    if layer_idx is not None and layer_idx < config.num_hash_layers:
        name = "hash_scored"
    if name in OWN_ROUTERS and name not in ROUTERS:
        ROUTERS[name] = OWN_ROUTERS[name]()
    if name not in ROUTERS:
        raise ValueError(
            f"router_type {name!r} is unknown: choose one of {', '.join(ROUTERS)}; if it is yours, import what registers it "
            "in ROUTERS, or run the code of a checkpoint by modeling_moe.checkpoint_code.import_own_router(folder)."
        )
    return ROUTERS[name]
