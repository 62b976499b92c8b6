# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""transformers' own checkpoints, dense and sparse, as MoE models with the same logits."""

from .families import DENSE_FAMILIES, FAMILIES, moe_config
from .importer import convert_checkpoint, to_moe


__all__ = ["DENSE_FAMILIES", "FAMILIES", "convert_checkpoint", "moe_config", "to_moe"]
