# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Rounds compute one pass of a layer whose matrices are never all in memory: some experts in each round.

# T tokens, K experts per token, E experts, H hidden size
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .problem import ExpertsProblem


if TYPE_CHECKING:
    from .backend import Backend


class Rounds(ABC):
    """Rounds adds up the experts' outputs, a range of expert ids at a time, in ascending order of the ids."""

    @abstractmethod
    def add(self, problem: ExpertsProblem, first: int, last: int) -> None:
        """Computes the experts with ids from `first` to `last`, whose matrices `problem` now holds."""

    @abstractmethod
    def output(self) -> torch.Tensor:
        """Returns the output (T, H) of the pass in the dtype of `x`."""


def index_in_round(index: torch.Tensor, first: int, last: int, num_experts: int) -> torch.Tensor:
    """Returns `index` (T, K) with the assignments of other experts than those from `first` to `last` made empty."""
    return index.masked_fill((index < first) | (index > last), num_experts)


class SummedRounds(Rounds):
    """SummedRounds adds each round's outputs to one sum (T, H) in `wide_dtype`.

    The sum has the bits of one pass if the back end adds up in ascending order of the ids, and does not round before.

    Args:
        problem: the tokens and the combine weights.
        index: (T, K) expert ids. An id outside [0, E) marks an empty assignment.
        add: adds the experts' output for the ids that it is given to the sum.
    """

    def __init__(
        self,
        problem: ExpertsProblem,
        index: torch.Tensor,
        add: Callable[[ExpertsProblem, torch.Tensor, torch.Tensor], None],
    ):
        self.index, self.dtype, self._add = index, problem.x.dtype, add
        self.total = torch.zeros_like(problem.x, dtype=problem.wide_dtype)

    def add(self, problem: ExpertsProblem, first: int, last: int) -> None:
        self._add(problem, index_in_round(self.index, first, last, problem.num_experts), self.total)

    def output(self) -> torch.Tensor:
        return self.total.to(self.dtype)


class GatheredRounds(Rounds):
    """GatheredRounds keeps the output of each assignment, and combines a token's K outputs at the end.

    It serves back ends that add up a token's experts in the order of its choices: a choice may come in any round. Each
    assignment is given to the back end as a token with one expert and the combine weight 1.

    Args:
        backend: the back end that computes the rounds.
        problem: the tokens and the combine weights.
        index: (T, K) expert ids. An id outside [0, E) marks an empty assignment.
    """

    def __init__(self, backend: "Backend", problem: ExpertsProblem, index: torch.Tensor):
        self.backend, self.index, self.weight = backend, index, problem.weight
        self.x = problem.x.repeat_interleave(index.shape[1], dim=0)
        self.rows = torch.zeros_like(self.x)

    def add(self, problem: ExpertsProblem, first: int, last: int) -> None:
        index = index_in_round(self.index, first, last, problem.num_experts).view(-1, 1)
        update = problem.up_update
        if update is not None and update.kept is not None:
            update = update._replace(kept=update.kept.repeat_interleave(self.index.shape[1], dim=0))
        problem = problem._replace(x=self.x, weight=torch.ones_like(self.weight).view(-1, 1), up_update=update)
        served = index < problem.num_experts
        problem, places = by_slot(problem, index)
        order = self.backend.order_by_expert(places, problem.num_experts)
        rows = self.backend.forward(problem, order, keep_h=False).output
        self.rows = torch.where(served, rows, self.rows)

    def output(self) -> torch.Tensor:
        rows = self.rows.to(self.weight.dtype).view(*self.weight.shape, -1)
        return (rows * self.weight[..., None]).sum(dim=1).to(self.rows.dtype)


def by_slot(problem: ExpertsProblem, index: torch.Tensor) -> tuple[ExpertsProblem, torch.Tensor]:
    """Replaces expert ids by slots, for back ends that take no [`ExpertsProblem.slots`].

    Such a back end adds up a token's experts in the order of its choices, so the order of the ids does not matter.

    Args:
        problem: with slots.
        index: (T, K) expert ids that are in slots. An id outside [0, E) marks an empty assignment.

    Returns:
        The problem with S experts, one for each slot, and the slot of each assignment, S for an empty one.
    """
    assert problem.slots is not None
    slots, number = problem.slots.to(index.device), len(problem.up)
    empty = (index < 0) | (index >= len(slots))
    places = slots.long()[index.masked_fill(empty, 0)].masked_fill(empty, number)
    expert = expert_of_slot(problem)
    updates = [
        None if update is None else update._replace(a=update.a[expert], b=update.b[expert])
        for update in (problem.up_update, problem.down_update)
    ]
    return problem._replace(up_update=updates[0], down_update=updates[1], slots=None), places


def expert_of_slot(problem: ExpertsProblem) -> torch.Tensor:
    """Returns the expert in each slot, (S,) int64, and expert 0 for a free slot."""
    assert problem.slots is not None
    slots = problem.slots.to(problem.x.device).long()
    experts = slots.new_zeros(len(problem.up) + 1)
    # experts that are in no slot have -1, which writes the last number, and that is cut off
    return experts.index_copy_(0, slots % len(experts), torch.arange(len(slots), device=slots.device))[:-1]
