# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package measures how well a causal LM predicts text, and how evenly its routers use the experts."""

from .expert_load import ExpertLoadRecorder, active_share, experts_modules
from .hf_metrics import BitsPerByte, RouterBalance
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
from .scoring import DomainScore, EvaluationArguments, evaluate_lm, load_for_scoring, score


__all__ = [
    "BitsPerByte",
    "DomainScore",
    "Entropies",
    "EvaluationArguments",
    "ExpertLoadRecorder",
    "RouterBalance",
    "active_share",
    "co_activation",
    "dead_experts",
    "dropped_share",
    "entropies",
    "evaluate_lm",
    "expert_domain_share",
    "experts_modules",
    "gate_margin",
    "load_for_scoring",
    "load_variation",
    "max_violation",
    "mean_experts",
    "score",
    "summary",
]
