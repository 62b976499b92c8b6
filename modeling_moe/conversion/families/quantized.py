# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads quantised tensors of published checkpoints: fp8 in blocks, and mxfp4."""

from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ...utils.errors import UserError
from .base import SourceFields


# in DeepSeek-V3's fp8 checkpoints, a square of weights with this side shares a scale
FP8_BLOCK = 128


def require_quantization(fields: SourceFields, method: str, **settings: Any) -> None:
    """Refuses a quantised source that the family's `tensors` function cannot read.

    Raises:
        UserError: names the settings that can be read.
    """
    found = fields.take("quantization_config")
    wanted = {"quant_method": method} | settings
    if found and any(found.get(name) != value for name, value in wanted.items()):
        raise UserError(
            f"quantization_config is {found!r} in the config.json of this {fields.model_type} model, which cannot be "
            f"read: only {wanted!r} can."
        )


def from_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantises an fp8 matrix (N, M) with scales of blocks (ceil(N / FP8_BLOCK), ceil(M / FP8_BLOCK)) to fp32."""
    for dim, size in enumerate(weight.shape):
        scale = scale.repeat_interleave(FP8_BLOCK, dim).narrow(dim, 0, size)
    return weight.float() * scale


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantises an expert's matrix to bf16 (N, M).

    Args:
        blocks: (N, M / 32, 16), two values in a byte.
        scales: (N, M / 32).
    """
    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16)[0].T
