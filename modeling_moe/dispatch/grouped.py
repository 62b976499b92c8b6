# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `grouped_mm`: torch's grouped GEMM, without a synchronisation. For GPUs where Triton is missing.

Rows past the last offset are left unwritten by `grouped_mm`, outputs and gradients alike: they are read by nothing but
`_combine`, which masks them.

# T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
"""

import torch
from torch.nn.functional import grouped_mm

from .gates import GATES
from .slots import Slots, invert


def _expert_of_row(slots: Slots) -> torch.Tensor:
    """(S,) the expert of each row, the last one's for rows past the end."""
    rows = torch.arange(len(slots.order), device=slots.order.device, dtype=torch.int32)
    return torch.searchsorted(slots.offsets[1:-1].contiguous(), rows, right=True)


def _project(states, matrices, bias, slots):
    product = grouped_mm(states, matrices.transpose(1, 2), offs=slots.offsets[1:])
    return product if bias is None else product.add_(bias[_expert_of_row(slots)])


def _combine(rows: torch.Tensor, slots: Slots, weight: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """(T, H) fp32: the sum of each token's rows of (S, H), weighted by (T, K)."""
    place = invert(slots.order)
    served = (place < slots.offsets[-1])[:, None]
    rows = torch.where(served, rows[place], 0).float().view(*shape, -1)
    return rows.sum(dim=1) if weight is None else (rows * weight[..., None]).sum(dim=1)


def forward(x, slots, weight, up, down, up_bias, down_bias, gate, constants, keep_h):
    """As [`~modeling_moe.dispatch.loop.forward`]."""
    tokens = slots.order // weight.shape[1]
    h = _project(x[tokens], up, up_bias, slots)
    acted = h.new_empty(len(h), down.shape[2])
    GATES[gate].forward(h, constants, acted)
    rows = _project(acted, down, down_bias, slots)
    return _combine(rows, slots, weight, weight.shape).to(x.dtype), h if keep_h else h[:0].clone()


def backward(grad, x, h, slots, weight, up, down, up_bias, down_bias, gate, constants, needs):
    """As [`~modeling_moe.dispatch.loop.backward`]."""
    need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = needs
    offsets, tokens = slots.offsets[1:], slots.order // weight.shape[1]
    if not len(h):
        h = _project(x[tokens], up, up_bias, slots)
    grad_rows, factor = grad[tokens], weight.flatten()[slots.order][:, None]
    back = grouped_mm(grad_rows, down, offs=offsets).float()  # (S, I), without the weight
    acted, grad_h = torch.empty_like(back, dtype=x.dtype), torch.empty_like(h)
    GATES[gate].backward(h, (back * factor).to(x.dtype), constants, acted, grad_h)
    grad_x = grad_weight = grad_up = grad_down = grad_up_bias = grad_down_bias = None
    if need_weight:
        slope = (back * acted).sum(dim=-1)
        if down_bias is not None:
            slope += (grad_rows * down_bias[_expert_of_row(slots)]).sum(dim=-1, dtype=torch.float32)
        place = invert(slots.order)
        grad_weight = torch.where(place < offsets[-1], slope[place], 0).view_as(weight)
    if need_x:
        grad_x = _combine(grouped_mm(grad_h, up, offs=offsets), slots, None, weight.shape).to(x.dtype)
    if need_up:
        grad_up = _weight_gradient(grad_h, x[tokens], slots, up)
    if need_down:
        grad_down = _weight_gradient(grad_rows, (acted * factor).to(x.dtype), slots, down)
    if need_up_bias:
        grad_up_bias = _bias_gradient(grad_h, slots, up_bias)
    if need_down_bias:
        grad_down_bias = _bias_gradient(grad_rows * factor, slots, down_bias)
    return [grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias]


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
