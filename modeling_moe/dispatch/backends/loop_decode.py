# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The loop back end's path for a few tokens without gradient, whose time is spent reading the chosen experts' matrices.

# T tokens, K experts per token, R rows (assignments that have an expert), E experts, H hidden size, I expert width
# C columns of the first projection; N rows and M columns of an expert's matrix
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import grouped_mm

from ..activations import ACTIVATIONS
from ..low_rank import LowRank
from ..problem import ExpertsProblem
from ..rounds import Rounds


def decode(problem: ExpertsProblem, index: torch.Tensor) -> torch.Tensor:
    """Computes the output (T, H) as described at [`~modeling_moe.dispatch.backend.Backend.decode`].

    Nothing is sorted on the device, and of the experts' matrices only those of chosen experts are read.
    """
    rows = DecodedRows(problem, index)
    rows.add(problem, 0, problem.num_experts - 1)
    return rows.output()


class DecodedRows(Rounds):
    """DecodedRows computes the rows of a few tokens in expert order, and combines them at the end.

    Each product has the rows of one expert at their place among all rows, and what is computed element by element is
    computed on all rows, so the bits do not depend on which experts come in which round.

    Args:
        problem: the tokens, the combine weights and the low-rank updates.
        index: (T, K) expert ids. An id outside [0, E) marks an empty assignment.
    """

    def __init__(self, problem: ExpertsProblem, index: torch.Tensor):
        self.problem, number, self.top_k = problem, problem.num_experts, index.shape[1]
        chosen = sorted(
            (expert, place) for place, expert in enumerate(index.flatten().tolist()) if 0 <= expert < number
        )
        self.experts = [expert for expert, _ in chosen]
        self.assignments = torch.tensor([place for _, place in chosen], device=problem.x.device, dtype=torch.long)
        x = problem.x
        self.states = x.expand(len(chosen), -1) if len(x) == 1 else x[self.assignments // self.top_k]
        self.h: torch.Tensor | None = None
        self.acted: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None

    def add(self, problem: ExpertsProblem, first: int, last: int) -> None:
        part = _Part(self.experts, bisect_left(self.experts, first), bisect_left(self.experts, last + 1))
        if part.start == part.end:
            return
        self.h = _project(self.states, problem.up, problem.up_bias, problem.up_update, part, problem.slots, self.h)
        acted = self.acted = self.states.new_empty(len(self.experts), problem.down.shape[2])
        ACTIVATIONS[problem.activation].forward(self.h, problem.constants, acted)
        self.rows = _project(
            acted, problem.down, problem.down_bias, problem.down_update, part, problem.slots, self.rows
        )

    def output(self) -> torch.Tensor:
        x, weight = self.problem.x, self.problem.weight
        if self.rows is None:
            return torch.zeros_like(x)
        factors, rows = weight.flatten()[self.assignments], self.rows.to(weight.dtype)
        if len(x) == 1:
            return torch.mm(factors[None], rows).to(x.dtype)
        output = torch.zeros_like(x, dtype=weight.dtype)
        return output.index_add_(0, self.assignments // self.top_k, rows * factors[:, None]).to(x.dtype)


class _Part(NamedTuple):
    """_Part names the rows of one round.

    Attributes:
        experts: the expert of each row of all rounds, in ascending order.
        start: the first row of the round.
        end: the row after the last one.
    """

    experts: list[int]
    start: int
    end: int

    @property
    def distinct(self) -> bool:
        """True if no two rows of all rounds have one expert."""
        return len(set(self.experts)) == len(self.experts)


def _project(
    states: torch.Tensor,
    matrices: torch.Tensor,
    bias: torch.Tensor | None,
    update: LowRank | None,
    part: _Part,
    slots: torch.Tensor | None,
    product: torch.Tensor | None,
) -> torch.Tensor:
    """Multiplies a round's rows of `states` (R, M) by their experts' updated matrices and adds the bias.

    Returns:
        `product` (R, N) with the rows of the round written, or a new one.
    """
    experts = part.experts[part.start : part.end]
    places: Sequence[int] = experts if slots is None else slots[experts].tolist()
    if product is None:
        product = states.new_empty(len(states), matrices.shape[1])
    _multiply(states, matrices, part, places, slots is None, product)
    rows = product[part.start : part.end]
    if update is not None:
        rows += _multiply_by_update(states, update, part.experts)[part.start : part.end]
    if bias is not None:
        rows += bias[places]
    return product


def _multiply(
    states: torch.Tensor,
    matrices: torch.Tensor,
    part: _Part,
    places: Sequence[int],
    in_order: bool,
    product: torch.Tensor,
) -> None:
    """Multiplies a round's rows of `states` (R, M) by matrices (., N, M) into `product` (R, N).

    Args:
        places: where the matrix of each row of the round lies.
        in_order: True if the round has all rows, and the matrix of expert e lies at e.
    """
    start, end = part.start, part.end
    if part.distinct:
        for place, row, result in zip(places, states[start:end], product[start:end], strict=True):
            torch.mv(matrices[place], row, out=result)
        return
    # rows that repeat one token have the stride 0, which oneDNN does not take
    states = states.contiguous()
    # in fp32 BLAS reads a matrix faster on the left of several rows; else one call for all experts costs least
    grouped = states.dtype != torch.float32 and _fits_grouped_mm(matrices)
    if grouped and in_order:
        ends = torch.tensor(part.experts, device=states.device).bincount(minlength=len(matrices)).cumsum(0).int()
        product.copy_(grouped_mm(states, matrices.transpose(1, 2), offs=ends))
        return
    for place, number in Counter(places).items():
        rows, results = states[start : start + number], product[start : start + number]
        if grouped:  # what `grouped_mm` does on a CPU, which takes the experts in the order of their matrices only
            torch.mm(rows, matrices[place].T, out=results)
        else:
            results.copy_((matrices[place] @ rows.T).T)
        start += number


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
