# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Dense checkpoints into Mixture-of-Experts checkpoints that start where the dense model ended, and these into others
with more or fewer experts."""

from ..resizing.extraction import extract_task
from ..resizing.growth import GrowthOptions, grow, release_experts
from ..resizing.pruning import PruningOptions, merge, prune
from ..resizing.resize import ResizeOptions, resize_checkpoint
from ..resizing.usage import Usage, measure_usage
from .assembly import refuse_mismatch, upcycle
from .experts import METHODS, inexactness
from .options import UpcyclingOptions
from .plan import UpcyclingPlan, make_plan, sparse_config
from .run import open_sources, plan_upcycling, upcycle_checkpoint


__all__ = [
    "METHODS",
    "GrowthOptions",
    "PruningOptions",
    "ResizeOptions",
    "UpcyclingOptions",
    "UpcyclingPlan",
    "Usage",
    "extract_task",
    "grow",
    "inexactness",
    "make_plan",
    "measure_usage",
    "merge",
    "open_sources",
    "plan_upcycling",
    "prune",
    "refuse_mismatch",
    "release_experts",
    "resize_checkpoint",
    "sparse_config",
    "upcycle",
    "upcycle_checkpoint",
]
