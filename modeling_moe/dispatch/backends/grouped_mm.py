# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `grouped_mm`: torch's grouped GEMM, without a synchronisation. For GPUs where Triton is missing.

Rows past the last offset are left unwritten by `grouped_mm`, outputs and gradients alike: they are read by nothing but
`combine`, which masks them.

# T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
"""

import torch
from torch.nn.functional import grouped_mm

from ..token_order import Slots, invert
from . import grouped_passes
from .grouped_passes import expert_of_row


class _Products:
    """[`~modeling_moe.dispatch.backends.grouped_passes.Products`] by `grouped_mm`; what was gathered once is kept."""

    def __init__(self, slots: Slots, top_k: int):
        self.slots, self.top_k, self.tokens = slots, top_k, slots.order // top_k
        self.taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _take(self, source: torch.Tensor) -> torch.Tensor:
        for known, rows in self.taken:
            if known is source:
                return rows
        self.taken.append((source, source[self.tokens]))
        return self.taken[-1][1]

    def gathered(self, source, matrices, bias):
        return self.rows(self._take(source), matrices, bias)

    def rows(self, left, matrices, bias):
        product = grouped_mm(left, matrices.transpose(1, 2), offs=self.slots.offsets[1:])
        return product if bias is None else product.add_(bias[expert_of_row(self.slots)])

    def outer(self, left, right, like, gather):
        left = self._take(left) if gather == "left" else left
        right = self._take(right) if gather == "right" else right
        return _weight_gradient(left, right, self.slots, like)

    def bias_gradient(self, rows, weight, like):
        if weight is not None:
            rows = self._take(rows) * weight.flatten()[self.slots.order][:, None]
        return _bias_gradient(rows, self.slots, like)

    def combine(self, rows, weight):
        place = invert(self.slots.order)
        served = (place < self.slots.offsets[-1])[:, None]
        rows = torch.where(served, rows[place], 0).float().view(-1, self.top_k, rows.shape[-1])
        return rows.sum(dim=1) if weight is None else (rows * weight[..., None]).sum(dim=1)


def forward(x, slots, weight, up, down, up_bias, down_bias, gate, constants, keep_h, low_rank=None):
    """As [`~modeling_moe.dispatch.backends.loop.forward`]."""
    products = _Products(slots, weight.shape[1])
    arguments = (x, weight, up, down, up_bias, down_bias, gate, constants, keep_h, low_rank)
    return grouped_passes.forward(products, *arguments)


def backward(grad, x, h, slots, weight, up, down, up_bias, down_bias, gate, constants, needs, low_rank=None):
    """As [`~modeling_moe.dispatch.backends.loop.backward`]."""
    products = _Products(slots, weight.shape[1])
    arguments = (grad, x, h, weight, up, down, up_bias, down_bias, gate, constants, needs, low_rank)
    return grouped_passes.backward(products, *arguments)


def _weight_gradient(left: torch.Tensor, right: torch.Tensor, slots: Slots, matrices: torch.Tensor) -> torch.Tensor:
    """leftᵀ right of each expert's rows."""
    product = grouped_mm(left.T, right, offs=slots.offsets[1:])
    # an idle expert's is garbage on some GPUs: https://github.com/pytorch/pytorch/issues/172439
    idle = slots.offsets[1:] == slots.offsets[:-1]
    return torch.empty_like(matrices).copy_(product.masked_fill_(idle[:, None, None], 0))


def _bias_gradient(rows: torch.Tensor, slots: Slots, bias: torch.Tensor) -> torch.Tensor:
    """Sum of each expert's rows; the rows past the end go into one more, which is cut off."""
    places = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
    expert = torch.searchsorted(slots.offsets[1:].contiguous(), places, right=True)
    total = torch.zeros(len(bias) + 1, bias.shape[1], device=bias.device, dtype=torch.float32)
    return total.index_add_(0, expert, rows.float())[:-1].to(bias.dtype)
