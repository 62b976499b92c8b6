# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A NaN or infinite weight stops a conversion, because no usable model can be made of it."""

import torch

from ..utils.errors import UserError


class UnusableError(UserError):
    """Running the command again cannot help, so everything written so far is deleted."""


def refuse_not_finite(tensor: torch.Tensor, name: str, remedy: str) -> None:
    """Raises an error if a tensor holds NaN or infinity.

    Args:
        tensor: tensor of any dtype and shape; integer, bool and 8-bit float tensors pass unchecked.
        name: name of the tensor, for the message.
        remedy: end of the message.

    Raises:
        UnusableError: if an element is NaN or infinite.
    """
    if not tensor.numel() or tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return
    # aminmax returns NaN if any element is NaN, and is twenty times as fast as isfinite on all elements
    least, largest = torch.aminmax(tensor)
    if not (torch.isfinite(least) and torch.isfinite(largest)):
        raise UnusableError(f"{name} holds NaN or infinity: {remedy}")
