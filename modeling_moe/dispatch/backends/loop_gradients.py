# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The loop back end works on chunks of one expert's rows and accumulates gradients over the chunks.

# T tokens, K experts per token, A = T*K assignments, E experts
# R rank of a low-rank update; N rows and M columns of an expert's matrix
"""

from typing import NamedTuple

import torch

from ..expert_order import ExpertOrder
from ..low_rank import Addition, FactorGradients, LowRank, Update
from .cpu_memory import in_huge_pages


class Chunk(NamedTuple):
    """Chunk is a block of consecutive rows of one expert.

    Attributes:
        number: the position of the chunk among all chunks.
        expert: the expert.
        rows: the number of rows.
        first: True for the expert's first chunk.
        last: True for the expert's last chunk.
    """

    number: int
    expert: int
    rows: int
    first: bool
    last: bool


class ChunkRows(NamedTuple):
    """ChunkRows holds the rows of one chunk.

    Attributes:
        chunk: the chunk.
        states: (rows, M) or (rows, N).
    """

    chunk: Chunk
    states: torch.Tensor


class WeightGradient:
    """WeightGradient sums the gradient of a tensor (E, N, M) over each expert's chunks, in the dtype of the products.

    Args:
        weights: (E, N, M), gives the shape, the dtype and the strides of the gradient.
        dtype: the dtype of the products.
        order: the expert order; gradients of idle experts are zero.
    """

    def __init__(self, weights: torch.Tensor, dtype: torch.dtype, order: ExpertOrder):
        self.total = in_huge_pages(torch.empty_like(weights))
        self.parts = self.total.unbind(0)
        for expert in torch.where(order.offsets[1:] == order.offsets[:-1])[0].tolist():
            self.parts[expert].zero_()
        self.sum = None if weights.dtype == dtype else torch.empty_like(weights[0], dtype=dtype)

    def add(self, chunk: Chunk, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds leftᵀ right of one chunk, from left (rows, N) and right (rows, M)."""
        target = self.parts[chunk.expert] if self.sum is None else self.sum
        if chunk.first:
            torch.mm(left.T, right, out=target)
        else:
            target.addmm_(left.T, right)
        if chunk.last and self.sum is not None:
            self.parts[chunk.expert].copy_(self.sum)


class ChunkUpdate(Update[ChunkRows]):
    """ChunkUpdate applies a low-rank update chunk by chunk.

    Args:
        low_rank: the update.
        dtype: the dtype of the products.
        kept_rows: for each chunk, the indices of its rows in `low_rank.kept`.
        order: the expert order.
        needs: which of the gradients of a and b are needed.
    """

    def __init__(
        self,
        low_rank: LowRank,
        dtype: torch.dtype,
        kept_rows: tuple[torch.Tensor, ...],
        order: ExpertOrder,
        needs: tuple[bool, bool],
    ):
        self.low_rank, self.kept_rows, self.trained = low_rank, kept_rows, any(needs)
        self.a = low_rank.a.to(dtype).unbind(0)
        self.b = rank_first(low_rank.b.to(dtype)).unbind(1)
        self.narrow_gradient: tuple[int, torch.Tensor] | None = None
        need_a, need_b = needs
        self.grad_a = WeightGradient(low_rank.a, dtype, order) if need_a else None
        self.grad_b: WeightGradient | None = None
        if need_b:
            experts, rows, rank = low_rank.b.shape
            packed = low_rank.b.new_empty(rank, experts, rows).transpose(0, 1)
            self.grad_b = WeightGradient(packed, dtype, order)

    def _kept(self, chunk: Chunk) -> torch.Tensor | None:
        return None if self.low_rank.kept is None else self.low_rank.kept[self.kept_rows[chunk.number]]

    def _narrow(self, rows: ChunkRows) -> torch.Tensor:
        """Returns a x, (R, rows)."""
        return self.a[rows.chunk.expert] @ self._drop(rows).T

    def _drop(self, rows: ChunkRows) -> torch.Tensor:
        kept = self._kept(rows.chunk)
        return rows.states if kept is None else rows.states * kept

    def _narrow_gradient(self, grad: ChunkRows) -> torch.Tensor:
        """Returns the gradient of a x without the scaling, (R, rows); it is computed once for each chunk."""
        if self.narrow_gradient is None or self.narrow_gradient[0] != grad.chunk.number:
            self.narrow_gradient = (grad.chunk.number, self.b[grad.chunk.expert] @ grad.states.T)
        return self.narrow_gradient[1]

    def forward(self, states: ChunkRows) -> Addition:
        return Addition(self._narrow(states).T, self.b[states.chunk.expert].T, self.low_rank.scaling)

    def backward(self, grad: ChunkRows) -> Addition:
        narrow, factor = self._narrow_gradient(grad).T, self.a[grad.chunk.expert].T
        return Addition(narrow, factor, self.low_rank.scaling, self._kept(grad.chunk))

    def accumulate(self, grad: ChunkRows, states: ChunkRows) -> None:
        if self.grad_a is not None:
            self.grad_a.add(grad.chunk, self._narrow_gradient(grad).T, self._drop(states))
        if self.grad_b is not None:
            self.grad_b.add(grad.chunk, self._narrow(states).T, grad.states)

    def gradients(self) -> FactorGradients:
        a = b = None
        if self.grad_a is not None:
            a = self.grad_a.total.mul_(self.low_rank.scaling)
        if self.grad_b is not None:
            total = self.grad_b.total.mul_(self.low_rank.scaling).transpose(0, 1)
            b = torch.empty_like(self.low_rank.b).copy_(rank_last(total))
        return FactorGradients(a, b)


def add_to(product: torch.Tensor, addition: Addition) -> None:
    """Adds an update's part to a product (rows, N) in place."""
    if addition.kept is None:
        product.addmm_(addition.narrow, addition.factor.T, alpha=addition.scaling)
    else:
        product.add_((addition.narrow @ addition.factor.T).mul_(addition.kept), alpha=addition.scaling)


# PEFT's matrix for b is (N, R*E), with the experts last, and the products need them first. torch transposes matrices
# fast, but not tensors of more dimensions


def rank_first(b: torch.Tensor) -> torch.Tensor:
    """Permutes (E, N, R) to a contiguous (R, E, N)."""
    experts, _, rank = b.shape
    return b.permute(1, 2, 0).flatten(1).t().contiguous().unflatten(0, (rank, experts))


def rank_last(total: torch.Tensor) -> torch.Tensor:
    """Permutes (R, E, N) to (E, N, R) in PEFT's layout of memory."""
    rank, experts, _ = total.shape
    return total.flatten(0, 1).t().contiguous().unflatten(1, (rank, experts)).permute(2, 0, 1)
