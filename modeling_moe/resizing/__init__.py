# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package changes the number of experts of a sparse checkpoint."""

from .extraction import extract_task
from .growth import GrowthOptions, grow, release_experts
from .pruning import PruningOptions, merge, prune
from .resize import ModelSize, ResizeOptions, resize_checkpoint
from .usage import Usage, measure_usage


__all__ = [
    "GrowthOptions",
    "ModelSize",
    "PruningOptions",
    "ResizeOptions",
    "Usage",
    "extract_task",
    "grow",
    "measure_usage",
    "merge",
    "prune",
    "release_experts",
    "resize_checkpoint",
]
