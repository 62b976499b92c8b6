# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package measures how well a causal LM predicts text, and how evenly its routers use the experts."""

from .hf_metrics import BitsPerByte, ExpertCaching, RouterBalance
from .scoring import DomainScore, EvaluationArguments, evaluate_lm, load_for_scoring, score


__all__ = [
    "BitsPerByte",
    "DomainScore",
    "EvaluationArguments",
    "ExpertCaching",
    "RouterBalance",
    "evaluate_lm",
    "load_for_scoring",
    "score",
]
