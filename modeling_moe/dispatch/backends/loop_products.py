# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The loop back end's products with experts' matrices one by one, in plain GEMMs.

# T tokens, K experts per token, A = T*K assignments, E experts; N rows and M columns of an expert's matrix
"""

import itertools
from collections.abc import Callable, Iterator

import torch

from ..expert_order import ExpertOrder, by_assignment
from .grouped_passes import Products, Side


class LoopProducts(Products):
    """LoopProducts implements [`Products`] by a loop over the experts that have rows.

    Args:
        order: the expert order.
        top_k: the number K of experts per token.
        product_dtype: returns the dtype to multiply a tensor in.
    """

    def __init__(self, order: ExpertOrder, top_k: int, product_dtype: Callable[[torch.Tensor], torch.dtype]):
        self.order, self.top_k, self.product_dtype = order, top_k, product_dtype
        self.tokens = order.assignment // top_k

    def _experts(self) -> Iterator[tuple[int, slice]]:
        """Yields each expert that has rows, and the rows."""
        for expert, (start, end) in enumerate(itertools.pairwise(self.order.offsets.tolist())):
            if start < end:
                yield expert, slice(start, end)

    def gathered(self, source: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.rows(source[self.tokens], matrices, bias)

    def rows(self, left: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = self.product_dtype(left)
        left, product = left.to(dtype), left.new_zeros(len(left), matrices.shape[1], dtype=dtype)
        for expert, rows in self._experts():
            torch.mm(left[rows], matrices[expert].to(dtype).T, out=product[rows])
            if bias is not None:
                product[rows] += bias[expert]
        return product.to(matrices.dtype)

    def outer(self, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor, gather: Side) -> torch.Tensor:
        dtype = self.product_dtype(left)
        left, right = left.to(dtype), right.to(dtype)
        left = left[self.tokens] if gather == "left" else left
        right = right[self.tokens] if gather == "right" else right
        total = torch.zeros_like(like)
        for expert, rows in self._experts():
            total[expert] = left[rows].T @ right[rows]
        return total

    def combine(self, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return combined(rows, self.order, self.top_k, weight)


def combined(rows: torch.Tensor, order: ExpertOrder, top_k: int, weight: torch.Tensor | None) -> torch.Tensor:
    """Sums each token's rows of (A, N) in fp32 or fp64, times `weight` (T, K) if it is given: (T, N)."""
    rows = (
        by_assignment(rows, order).to(torch.promote_types(rows.dtype, torch.float32)).view(-1, top_k, rows.shape[-1])
    )
    return rows.sum(dim=1) if weight is None else (rows * weight[..., None]).sum(dim=1)
