# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""TritonUpdate applies a low-rank update inside the Triton kernels' products.

# T tokens, K experts per token, A = T*K assignments, E experts
# R rank of the update; N rows and M columns of an expert's matrix
"""

import torch

from ...low_rank import Addition, FactorGradients, LowRank, Update
from .row_tiles import RowTiles, Side


class TritonUpdate(Update[torch.Tensor]):
    """TritonUpdate implements [`~modeling_moe.dispatch.low_rank.Update`] by launches of narrow products.

    Args:
        low_rank: the update.
        rows: the tiles of rows.
        dtype: the dtype of the products.
        gathered: True if the update's input has one row per token, False if it has one per assignment.
        needs: which of the gradients of a and b are needed.

    Attributes:
        a: (E, R, M) in the dtype of the products.
        b: (E, N, R) in the dtype of the products, times the scaling, so that no product has to be scaled.
    """

    def __init__(
        self, low_rank: LowRank, rows: RowTiles, dtype: torch.dtype, gathered: bool, needs: tuple[bool, bool]
    ):
        self.low_rank, self.rows, self.gathered, self.needs = low_rank, rows, gathered, needs
        # in PEFT's layout of b the experts come last, so consecutive numbers belong to different experts
        b = low_rank.b if low_rank.scaling == 1 else low_rank.b * low_rank.scaling
        self.a, self.b = low_rank.a.to(dtype).contiguous(), b.to(dtype).contiguous()
        self.kept = low_rank.kept
        self.grad_narrow: torch.Tensor | None = None
        self.result = FactorGradients()

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            return states
        return states * (self.kept if self.gathered else self.kept.index_select(0, self.rows.order.assignment))

    def _narrow(self, dropped: torch.Tensor) -> torch.Tensor:
        """Multiplies the input after dropout by a: (A, R)."""
        return (self.rows.gathered_narrow if self.gathered else self.rows.narrow)(dropped, self.a)

    def _narrow_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of a x, (A, R); it is computed once."""
        if self.grad_narrow is None:
            multiply = self.rows.narrow if self.gathered else self.rows.gathered_narrow
            self.grad_narrow = multiply(grad, self.b.transpose(1, 2))
        return self.grad_narrow

    def forward(self, states: torch.Tensor) -> Addition:
        return Addition(self._narrow(self._drop(states)), self.b)

    def backward(self, grad: torch.Tensor) -> Addition:
        return Addition(self._narrow_gradient(grad), self.a.transpose(1, 2), kept=self.kept)

    def accumulate(self, grad: torch.Tensor, states: torch.Tensor) -> None:
        """Computes the factors' gradients; rows of `states` (A, M) carry the combine weight."""
        if not any(self.needs):
            return
        low_rank, dropped, grad_a, grad_b = self.low_rank, self._drop(states), None, None
        if self.needs[0]:
            side: Side = "right" if self.gathered else "neither"
            grad_a = self.rows.weight_gradient(self._narrow_gradient(grad), dropped, low_rank.a, side)
        if self.needs[1]:
            side = "neither" if self.gathered else "left"
            grad_b = self.rows.weight_gradient(grad, self._narrow(dropped), low_rank.b, side).mul_(low_rank.scaling)
        self.result = FactorGradients(grad_a, grad_b)

    def gradients(self) -> FactorGradients:
        return self.result
