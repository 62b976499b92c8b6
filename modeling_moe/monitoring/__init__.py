# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package shows the routing of any Mixture of Experts in transformers, while it trains and afterwards."""

from .comparing import compare_traces
from .expert_load import ExpertLoadRecorder
from .figures import LayerFigures, RoutingFigures
from .layers import SparseLayer, UnreachableRouting, active_share, experts_modules, sparse_layers
from .logged_history import read_history
from .observing import LayerPass, Observation, observe
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


__all__ = [
    "Entropies",
    "ExpertLoadRecorder",
    "LayerFigures",
    "LayerPass",
    "LayerTrace",
    "ModelTrace",
    "Observation",
    "RoutingFigures",
    "RoutingReport",
    "RoutingWatch",
    "SparseLayer",
    "TraceOptions",
    "Traced",
    "UnreachableRouting",
    "active_share",
    "co_activation",
    "compare_traces",
    "dead_experts",
    "dropped_share",
    "entropies",
    "expert_domain_share",
    "experts_modules",
    "gate_margin",
    "load_variation",
    "max_violation",
    "mean_experts",
    "observe",
    "read_history",
    "refuse_mixing",
    "sparse_layers",
    "summary",
    "trace_routing",
    "watch",
]
