# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Dense checkpoints into Mixture-of-Experts checkpoints that start where the dense model ended."""

from .extraction import extract_task
from .methods import METHODS, upcycle
from .options import UpcyclingOptions
from .plan import UpcyclingPlan, make_plan
from .run import Verification, upcycle_checkpoint, verify


__all__ = [
    "METHODS",
    "UpcyclingOptions",
    "UpcyclingPlan",
    "Verification",
    "extract_task",
    "make_plan",
    "upcycle",
    "upcycle_checkpoint",
    "verify",
]
