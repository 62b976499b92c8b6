# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package upcycles dense checkpoints: the result is a Mixture of Experts that computes the dense model's
function.
"""

from .assembly import assemble, refuse_mismatch
from .experts import METHODS, reason_not_exact
from .options import UpcyclingOptions
from .plan import UpcyclingPlan, make_plan, sparse_config
from .upcycle import open_sources, plan_upcycling, upcycle_checkpoint


__all__ = [
    "METHODS",
    "UpcyclingOptions",
    "UpcyclingPlan",
    "assemble",
    "make_plan",
    "open_sources",
    "plan_upcycling",
    "reason_not_exact",
    "refuse_mismatch",
    "sparse_config",
    "upcycle_checkpoint",
]
