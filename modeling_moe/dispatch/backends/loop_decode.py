# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The loop back end's path for a few tokens without gradient, whose time is spent reading the chosen experts' matrices.

# T tokens, K experts per token, R rows (assignments that have an expert), E experts, I expert width
# N rows and M columns of an expert's matrix
"""

from collections import Counter

import torch
from torch.nn.functional import grouped_mm

from ..activations import ACTIVATIONS
from ..low_rank import LowRank
from ..problem import ExpertsProblem


def decode(problem: ExpertsProblem, index: torch.Tensor) -> torch.Tensor:
    """Computes the output (T, H) as described at [`~modeling_moe.dispatch.backend.Backend.decode`].

    Nothing is sorted on the device, and of the experts' matrices only those of chosen experts are read.
    """
    x, weight, number = problem.x, problem.weight, len(problem.up)
    chosen = sorted((expert, place) for place, expert in enumerate(index.flatten().tolist()) if 0 <= expert < number)
    if not chosen:
        return torch.zeros_like(x)
    experts = [expert for expert, _ in chosen]
    assignments = torch.tensor([assignment for _, assignment in chosen], device=x.device)
    factors = weight.flatten()[assignments]

    states = x.expand(len(assignments), -1) if len(x) == 1 else x[assignments // index.shape[1]]
    h = _project(states, problem.up, problem.up_bias, problem.up_update, experts)
    acted = x.new_empty(len(assignments), problem.down.shape[2])
    ACTIVATIONS[problem.activation].forward(h, problem.constants, acted)
    rows = _project(acted, problem.down, problem.down_bias, problem.down_update, experts).to(weight.dtype)
    if len(x) == 1:
        return torch.mm(factors[None], rows).to(x.dtype)
    output = torch.zeros_like(x, dtype=weight.dtype)
    return output.index_add_(0, assignments // index.shape[1], rows * factors[:, None]).to(x.dtype)


def _project(
    states: torch.Tensor,
    matrices: torch.Tensor,
    bias: torch.Tensor | None,
    update: LowRank | None,
    experts: list[int],
) -> torch.Tensor:
    """Multiplies rows (R, M) by their experts' updated matrices and adds the bias: (R, N)."""
    product = _multiply(states, matrices, experts)
    if update is not None:
        product += _multiply_by_update(states, update, experts)
    if bias is not None:
        product += bias[experts]
    return product


def _multiply(states: torch.Tensor, matrices: torch.Tensor, experts: list[int]) -> torch.Tensor:
    """Multiplies rows (R, M) by their experts' matrices (E, N, M): (R, N)."""
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


def _multiply_by_update(states: torch.Tensor, update: LowRank, experts: list[int]) -> torch.Tensor:
    """Multiplies rows (R, M) by their experts' low-rank updates: (R, N)."""
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
    """Returns True if `grouped_mm` takes the matrices: rows of multiples of 16 bytes, and an address that is one."""
    sizes = (size * matrices.element_size() for size in matrices.shape[1:])
    return matrices.dtype != torch.float64 and matrices.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in sizes)
