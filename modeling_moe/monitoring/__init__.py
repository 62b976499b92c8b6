# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package shows the routing of any Mixture of Experts in transformers, while it trains and afterwards."""

from typing import TYPE_CHECKING, Any

from .comparing import compare_traces
from .figures import LayerFigures, RoutingFigures
from .layers import SparseLayer, UnreachableRouting, active_share, experts_modules, sparse_layers
from .logged_history import read_history
from .loss_meter import LossMeans, report_router_losses
from .observing import LayerPass, ModelHook, Observation, observe
from .probabilities import ScoringEvidence, certain, explanation, probabilities
from .report_data import LayerTrace, ModelTrace, RoutingReport
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
from .tracing import Traced, TraceOptions, refuse_mixing, trace_routing
from .watching import RoutingWatch, watch


if TYPE_CHECKING:
    from .callback import RoutingCallback


__all__ = [
    "Entropies",
    "LayerFigures",
    "LayerPass",
    "LayerTrace",
    "LossMeans",
    "ModelHook",
    "ModelTrace",
    "Observation",
    "RoutingCallback",
    "RoutingFigures",
    "RoutingReport",
    "RoutingWatch",
    "ScoringEvidence",
    "SparseLayer",
    "TraceOptions",
    "Traced",
    "UnreachableRouting",
    "active_share",
    "certain",
    "co_activation",
    "compare_traces",
    "dead_experts",
    "dropped_share",
    "entropies",
    "expert_domain_share",
    "experts_modules",
    "explanation",
    "gate_margin",
    "load_variation",
    "max_violation",
    "mean_experts",
    "observe",
    "probabilities",
    "read_history",
    "refuse_mixing",
    "report_router_losses",
    "sparse_layers",
    "summary",
    "trace_routing",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Imports `RoutingCallback` when it is first used, since transformers' `Trainer` takes long to import."""
    if name == "RoutingCallback":
        from .callback import RoutingCallback

        return RoutingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
