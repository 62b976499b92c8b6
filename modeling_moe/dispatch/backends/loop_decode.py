# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The loop's path for a few tokens without gradient, where reading the chosen experts' matrices takes the time.

# T tokens, K experts per token, R rows (the slots that are served), H hidden, I expert width, E experts
"""

from collections import Counter

import torch
from torch.nn.functional import grouped_mm

from ..gates import GATES
from ..low_rank import LowRank


def decode(x, index, weight, up, down, up_bias, down_bias, gate, constants, low_rank=None):
    """[`~modeling_moe.dispatch.backends.loop.forward`] from `index` (T, K) rather than slots, and without h: nothing is sorted,
    and nothing but the chosen experts' weights is read.

    Returns:
        (T, H).
    """
    chosen = sorted((expert, slot) for slot, expert in enumerate(index.flatten().tolist()) if 0 <= expert < len(up))
    if not chosen:
        return torch.zeros_like(x)
    experts, slots = [expert for expert, _ in chosen], torch.tensor([slot for _, slot in chosen], device=x.device)
    factors = weight.flatten()[slots]

    up_update, down_update = low_rank or (None, None)
    states = x.expand(len(slots), -1) if len(x) == 1 else x[slots // index.shape[1]]
    h = _project_few(states, up, experts)
    if up_update is not None:
        h += _update_few(states, up_update, experts)
    if up_bias is not None:
        h += up_bias[experts]
    acted = x.new_empty(len(slots), down.shape[2])
    GATES[gate].forward(h, constants, acted)
    rows = _project_few(acted, down, experts)
    if down_update is not None:
        rows += _update_few(acted, down_update, experts)
    if down_bias is not None:
        rows += down_bias[experts]
    rows = rows.to(weight.dtype)
    if len(x) == 1:
        return torch.mm(factors[None], rows).to(x.dtype)
    output = torch.zeros_like(x, dtype=weight.dtype)
    return output.index_add_(0, slots // index.shape[1], rows * factors[:, None]).to(x.dtype)


def _project_few(states: torch.Tensor, matrices: torch.Tensor, experts: list[int]) -> torch.Tensor:
    """Rows (R, M), each times its expert's matrix of (E, N, M): (R, N)."""
    counts = Counter(experts)
    if len(counts) == len(experts):
        out = states.new_empty(len(states), matrices.shape[1])
        for expert, row, result in zip(experts, states, out, strict=True):
            torch.mv(matrices[expert], row, out=result)
        return out
    # rows that repeat one token have the stride 0, which oneDNN does not take
    states = states.contiguous()
    # in fp32 BLAS reads a matrix faster on the left of several rows; else one call for all experts costs least
    if states.dtype != torch.float32 and _fits_grouped_mm(matrices):
        ends = torch.tensor(experts, device=states.device).bincount(minlength=len(matrices)).cumsum(0).int()
        return grouped_mm(states, matrices.transpose(1, 2), offs=ends)
    parts = states.split(list(counts.values()))
    return torch.cat([(matrices[expert] @ rows.T).T for expert, rows in zip(counts, parts, strict=True)])


def _update_few(states: torch.Tensor, update: LowRank, experts: list[int]) -> torch.Tensor:
    """Rows (R, M), each with its expert's update: (R, N)."""
    counts = Counter(experts)
    chosen = list(counts)
    a, b = update.a[chosen].to(states.dtype), update.b[chosen].to(states.dtype)
    if len(chosen) == len(experts):
        rows = torch.bmm(b, torch.bmm(a, states[..., None]))[..., 0]
    else:
        parts = states.split(list(counts.values()))
        rows = torch.cat([part @ a.T @ b.T for part, a, b in zip(parts, a, b, strict=True)])
    return rows.mul_(update.scaling)


def _fits_grouped_mm(matrices: torch.Tensor) -> bool:
    """Whether `grouped_mm` takes them: rows of a multiple of 16 bytes, from an address that is one."""
    sizes = (size * matrices.element_size() for size in matrices.shape[1:])
    return matrices.dtype != torch.float64 and matrices.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in sizes)
