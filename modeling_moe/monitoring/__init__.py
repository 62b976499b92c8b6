# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package shows the routing of any Mixture of Experts in transformers, while it trains and afterwards."""

from .expert_load import ExpertLoadRecorder
from .layers import SparseLayer, UnreachableRouting, active_share, experts_modules, sparse_layers
from .observing import LayerPass, Observation, observe
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


__all__ = [
    "Entropies",
    "ExpertLoadRecorder",
    "LayerPass",
    "Observation",
    "SparseLayer",
    "UnreachableRouting",
    "active_share",
    "co_activation",
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
    "sparse_layers",
    "summary",
]
