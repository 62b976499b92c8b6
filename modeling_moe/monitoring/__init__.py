# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package shows the routing of any Mixture of Experts in transformers, while it trains and afterwards."""

from typing import TYPE_CHECKING, Any

from .active_parameters import (
    active_parameters,
    active_share,
    embedding_modules,
    experts_per_token,
    idle_parameters,
)
from .batch_frames import BatchFrame, BatchFrames
from .batches import argument_names, cache_of, next_labels, padding_of
from .drift import DomainDrift, Drift, LayerDrift, expert_drift
from .figures import LayerFigures, RoutingFigures
from .layers import SparseLayer, UnreachableRouting, experts_modules, sparse_block, sparse_layers
from .local_ids import hides_ids
from .loss_meter import LossMeans, report_router_losses
from .observing import LayerPass, ModelHook, Observation, in_backward, observe
from .probabilities import ScoringEvidence, certain, explanation, probabilities
from .routing_metrics import (
    Entropies,
    co_activation,
    dead_experts,
    dropped_share,
    entropies,
    expert_domain_share,
    gate_margin,
    load_variation,
    max_violation,
    mean_experts,
    summary,
)
from .watching import RoutingWatch, watch


if TYPE_CHECKING:
    from .callback import RoutingCallback


__all__ = [
    "BatchFrame",
    "BatchFrames",
    "DomainDrift",
    "Drift",
    "Entropies",
    "LayerDrift",
    "LayerFigures",
    "LayerPass",
    "LossMeans",
    "ModelHook",
    "Observation",
    "RoutingCallback",
    "RoutingFigures",
    "RoutingWatch",
    "ScoringEvidence",
    "SparseLayer",
    "UnreachableRouting",
    "active_parameters",
    "active_share",
    "argument_names",
    "cache_of",
    "certain",
    "co_activation",
    "dead_experts",
    "dropped_share",
    "entropies",
    "expert_domain_share",
    "embedding_modules",
    "expert_drift",
    "experts_modules",
    "experts_per_token",
    "explanation",
    "gate_margin",
    "hides_ids",
    "idle_parameters",
    "in_backward",
    "load_variation",
    "max_violation",
    "mean_experts",
    "next_labels",
    "observe",
    "padding_of",
    "probabilities",
    "report_router_losses",
    "sparse_block",
    "sparse_layers",
    "summary",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Imports `RoutingCallback` when it is first used, since transformers' `Trainer` takes long to import."""
    if name == "RoutingCallback":
        from .callback import RoutingCallback

        return RoutingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
