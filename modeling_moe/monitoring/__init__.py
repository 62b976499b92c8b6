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
from .layers import (
    SparseLayer,
    UnreachableRouting,
    experts_modules,
    refuse_skipped_tokens,
    sparse_block,
    sparse_layers,
)
from .local_ids import hides_ids
from .loss_meter import LossMeans, report_router_losses
from .observing import LayerPass, ModelHook, Observation, in_backward, observe
from .probabilities import ScoringEvidence, certain, explanation, probabilities
from .ranks import is_distributed, repeats_batch, sum_over_ranks
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
    from .figures_callback import FiguresCallback


__all__ = [
    "BatchFrame",
    "BatchFrames",
    "DomainDrift",
    "Drift",
    "Entropies",
    "FiguresCallback",
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
    "is_distributed",
    "load_variation",
    "max_violation",
    "mean_experts",
    "next_labels",
    "observe",
    "padding_of",
    "probabilities",
    "refuse_skipped_tokens",
    "repeats_batch",
    "report_router_losses",
    "sparse_block",
    "sparse_layers",
    "sum_over_ranks",
    "summary",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Imports a callback when it is first used, since transformers' `Trainer` takes long to import."""
    if name == "RoutingCallback":
        from .callback import RoutingCallback

        return RoutingCallback
    if name == "FiguresCallback":
        from .figures_callback import FiguresCallback

        return FiguresCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
