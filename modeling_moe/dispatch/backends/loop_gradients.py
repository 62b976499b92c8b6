# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The rows that pass one expert at once, and what is summed over them: gradients of matrices and of low-rank factors.

# T tokens, K experts per token, S = T*K slots, E experts, R rank, M columns of a matrix, N rows of it
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..low_rank import LowRank
from .cpu_memory import in_huge_pages


class Chunk(NamedTuple):
    """Rows of one expert: which chunk of all it is, how many rows, and whether they are the first and the last ones."""

    number: int
    expert: int
    rows: int
    first: bool
    last: bool


class WeightGradient:
    """Gradient of one kind of expert matrix, summed over an expert's chunks in the dtype of the products."""

    def __init__(self, weights: torch.Tensor, dtype: torch.dtype, offsets: torch.Tensor):
        self.total = in_huge_pages(torch.empty_like(weights))
        self.parts = self.total.unbind(0)
        for expert in torch.where(offsets[1:] == offsets[:-1])[0].tolist():
            self.parts[expert].zero_()
        self.scratch: Any = None if weights.dtype == dtype else torch.empty_like(weights[0], dtype=dtype)

    def add(self, chunk: Chunk, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds leftᵀ right, of one chunk."""
        into = self.parts[chunk.expert] if self.scratch is None else self.scratch
        if chunk.first:
            torch.mm(left.T, right, out=into)
        else:
            into.addmm_(left.T, right)
        if chunk.last and self.scratch is not None:
            self.parts[chunk.expert].copy_(self.scratch)


class Update:
    """A low-rank update of one kind of expert matrix, chunk by chunk; one that is None does nothing.

    Args:
        low_rank: the update.
        dtype: of the products.
        kept_rows: for each chunk, its rows of `low_rank.kept`.
        needs: whether the gradients of a and of b are wanted; neither if empty.
        offsets: of the [`~modeling_moe.dispatch.token_order.Slots`].

    Attributes:
        trained: whether any gradient is wanted.
    """

    def __init__(
        self,
        low_rank: LowRank | None,
        dtype: torch.dtype,
        kept_rows: tuple[torch.Tensor, ...],
        needs: Sequence[bool],
        offsets: torch.Tensor,
    ):
        self.low_rank: Any = low_rank
        self.grad_a: Any = None
        self.grad_b: Any = None
        self.trained = any(needs)
        if low_rank is None:
            return
        self.scaling, self.kept_rows = low_rank.scaling, kept_rows
        self.a = low_rank.a.to(dtype).unbind(0)
        self.b = rank_first(low_rank.b.to(dtype)).unbind(1)
        need_a, need_b = needs or (False, False)
        if need_a:
            self.grad_a = WeightGradient(low_rank.a, dtype, offsets)
        if need_b:
            experts, rows, rank = low_rank.b.shape
            packed = low_rank.b.new_empty(rank, experts, rows).transpose(0, 1)
            self.grad_b = WeightGradient(packed, dtype, offsets)

    def _kept(self, chunk: Chunk) -> torch.Tensor | None:
        return None if self.low_rank.kept is None else self.low_rank.kept[self.kept_rows[chunk.number]]

    def _dropped(self, chunk: Chunk, states: torch.Tensor) -> torch.Tensor:
        kept = self._kept(chunk)
        return states if kept is None else states * kept

    def add(self, chunk: Chunk, states: torch.Tensor, output: torch.Tensor) -> None:
        """Adds the update of states (rows, M) to output (rows, N)."""
        if self.low_rank is not None:
            narrow = self.a[chunk.expert] @ self._dropped(chunk, states).T
            output.addmm_(narrow.T, self.b[chunk.expert], alpha=self.scaling)

    def add_back(self, chunk: Chunk, grad: torch.Tensor, grad_states: torch.Tensor) -> torch.Tensor | None:
        """From the gradient of the output (rows, N) adds to that of the states (rows, M); returns that of a x, (R, rows),
        without the scaling."""
        if self.low_rank is None:
            return None
        narrow, kept = self.b[chunk.expert] @ grad.T, self._kept(chunk)
        if kept is None:
            grad_states.addmm_(narrow.T, self.a[chunk.expert], alpha=self.scaling)
        else:
            grad_states.add_((narrow.T @ self.a[chunk.expert]).mul_(kept), alpha=self.scaling)
        return narrow

    def add_gradients(self, chunk: Chunk, narrow: torch.Tensor | None, grad: torch.Tensor, states: Any) -> None:
        """Adds to the factors' gradients; `narrow` is what `add_back` returned, or None to compute it."""
        if not self.trained:
            return
        states = self._dropped(chunk, states)
        if self.grad_a is not None:
            self.grad_a.add(chunk, (self.b[chunk.expert] @ grad.T if narrow is None else narrow).T, states)
        if self.grad_b is not None:
            self.grad_b.add(chunk, (self.a[chunk.expert] @ states.T).T, grad)

    def gradients(self) -> list[torch.Tensor | None]:
        """Of a and b, None where not wanted."""
        a = b = None
        if self.grad_a is not None:
            a = self.grad_a.total.mul_(self.scaling)
        if self.grad_b is not None:
            total = self.grad_b.total.mul_(self.scaling).transpose(0, 1)
            b = torch.empty_like(self.low_rank.b).copy_(rank_last(total))
        return [a, b]


# PEFT's matrix for b is (N, R*E), the reverse of what products want: torch transposes matrices fast, and no more than that


def rank_first(b: torch.Tensor) -> torch.Tensor:
    """(E, N, R) -> (R, E, N), where each expert's rows are contiguous."""
    experts, _, rank = b.shape
    return b.permute(1, 2, 0).flatten(1).t().contiguous().unflatten(0, (rank, experts))


def rank_last(total: torch.Tensor) -> torch.Tensor:
    """(R, E, N) -> (E, N, R) as PEFT has it."""
    rank, experts, _ = total.shape
    return total.flatten(0, 1).t().contiguous().unflatten(1, (rank, experts)).permute(2, 0, 1)
