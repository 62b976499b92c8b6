# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A weight that is NaN or infinite stops a conversion: nothing that is made of it can be a model."""

import torch

from ..utils.errors import UserError


class UnusableError(UserError):
    """A mistake that no further run mends, so that what was written so far is deleted."""


def refuse_not_finite(tensor: torch.Tensor, name: str, remedy: str) -> None:
    """Refuses NaN and infinity.

    Args:
        tensor: any dtype and shape; integers, bool and 8-bit floats pass.
        name: of the tensor, for the message.
        remedy: end of the message.

    Raises:
        UnusableError: if an element is NaN or infinite.
    """
    if not tensor.numel() or tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return
    # both are NaN where an element is; twenty times as fast as isfinite
    least, largest = torch.aminmax(tensor)
    if not (torch.isfinite(least) and torch.isfinite(largest)):
        raise UnusableError(f"{name} holds NaN or infinity: {remedy}")
