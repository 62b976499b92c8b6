# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes forward and backward as grouped matrix products over all rows.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
# C columns of the first projection; R rank of a low-rank update; N rows and M columns of an expert's matrix
"""

from typing import Literal, Protocol

import torch
from torch.nn.functional import pad

from ..activations import ACTIVATIONS
from ..expert_order import ExpertOrder, expert_of_row, row_of_assignment
from ..low_rank import Addition, FactorGradients, LowRank, Update
from ..problem import Combined, ExpertsProblem, Gradients, Needs


Side = Literal["left", "right", "neither"]
# ranks are padded to a multiple of 16 bytes in 16 bits, which `grouped_mm` needs
RANK_STEP = 8


class Products(Protocol):
    """Products is the set of grouped products that a back end brings for one expert order.

    Rows of empty assignments may hold anything. Only `combine` reads them, and it leaves them out.
    """

    order: ExpertOrder

    def gathered(self, source: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiplies each row's token of `source` (T, M) by its expert's matrix (E, N, M) and adds the bias: (A, N)."""
        ...

    def rows(self, left: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiplies each row of `left` (A, M) by its expert's matrix (E, N, M) and adds the bias: (A, N)."""
        ...

    def outer(self, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor, gather: Side) -> torch.Tensor:
        """Computes leftᵀ right over each expert's rows, 0 for an idle expert.

        Args:
            left: (A, N), or (T, N) if it is gathered.
            right: (A, M), or (T, M) if it is gathered.
            like: (E, N, M), gives the dtype and the strides of the result.
            gather: the side that has one row per token rather than one per assignment.
        """
        ...

    def combine(self, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Sums each token's rows of (A, H) in fp32 or fp64, times `weight` (T, K) if it is given: (T, H)."""
        ...


class LayerProducts(Products, Protocol):
    """LayerProducts is what the passes of whole experts need besides."""

    def bias_gradient(self, rows: torch.Tensor, weight: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Sums each expert's rows (A, N), or `weight` (T, K) times `rows` (T, N), into a tensor like `like` (E, N)."""
        ...


class GroupedUpdate(Update[torch.Tensor]):
    """GroupedUpdate applies a low-rank update by a back end's grouped products.

    Args:
        low_rank: the update.
        products: the grouped products.
        dtype: the dtype of the products.
        gather: True if the update's input has one row per token, False if it has one per assignment.
        needs: which of the gradients of a and b are needed.
    """

    def __init__(
        self, low_rank: LowRank, products: Products, dtype: torch.dtype, gather: bool, needs: tuple[bool, bool]
    ):
        self.low_rank, self.products, self.gather, self.needs = low_rank, products, gather, needs
        missing = -low_rank.a.shape[1] % RANK_STEP
        self.a = pad(low_rank.a.to(dtype), (0, 0, 0, missing))
        self.b = pad(low_rank.b.to(dtype), (0, missing)).contiguous()
        self.kept = low_rank.kept
        if self.kept is not None and not gather:
            self.kept = self.kept[products.order.assignment]
        self.grad_narrow: torch.Tensor | None = None
        self.result = FactorGradients()

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.kept is None else states * self.kept

    def _narrow(self, states: torch.Tensor) -> torch.Tensor:
        multiply = self.products.gathered if self.gather else self.products.rows
        return multiply(self._drop(states), self.a, None)

    def _narrow_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of a x without the scaling, (A, R); it is computed once."""
        if self.grad_narrow is None:
            multiply = self.products.rows if self.gather else self.products.gathered
            self.grad_narrow = multiply(grad, self.b.transpose(1, 2), None)
        return self.grad_narrow

    def forward(self, states: torch.Tensor) -> Addition:
        return Addition(self._narrow(states), self.b, self.low_rank.scaling)

    def backward(self, grad: torch.Tensor) -> Addition:
        kept = self.kept
        if kept is not None and self.gather:
            assignment = self.products.order.assignment
            kept = kept[assignment // (len(assignment) // len(kept))]
        return Addition(self._narrow_gradient(grad), self.a.transpose(1, 2), self.low_rank.scaling, kept)

    def accumulate(self, grad: torch.Tensor, states: torch.Tensor) -> None:
        """Computes the factors' gradients; rows of `states` (A, M) carry the combine weight."""
        low_rank, grad_a, grad_b = self.low_rank, None, None
        rank, outer = low_rank.a.shape[1], self.products.outer
        if self.needs[0]:
            like = torch.empty_like(self.a, dtype=low_rank.a.dtype)
            side: Side = "right" if self.gather else "neither"
            grad_a = outer(self._narrow_gradient(grad), self._drop(states), like, side)[:, :rank] * low_rank.scaling
        if self.needs[1]:
            like = torch.empty_like(self.b, dtype=low_rank.b.dtype)
            side = "neither" if self.gather else "left"
            grad_b = outer(grad, self._narrow(states), like, side)[..., :rank] * low_rank.scaling
            grad_b = torch.empty_like(low_rank.b).copy_(grad_b)
        self.result = FactorGradients(grad_a, grad_b)

    def gradients(self) -> FactorGradients:
        return self.result


def add_update(products: Products, product: torch.Tensor, addition: Addition) -> torch.Tensor:
    """Adds an update's part to a product in place."""
    rows = products.rows(addition.narrow, addition.factor, None).mul_(addition.scaling)
    product += rows if addition.kept is None else rows.mul_(addition.kept)
    return product


class GroupedPass:
    """GroupedPass computes one forward or one backward by a back end's grouped products."""

    def __init__(self, problem: ExpertsProblem, products: LayerProducts, needs: Needs):
        self.problem, self.products, self.needs = problem, products, needs

        def update(low_rank: LowRank | None, gather: bool, needs: tuple[bool, bool]) -> GroupedUpdate | None:
            if low_rank is None:
                return None
            return GroupedUpdate(low_rank, products, problem.x.dtype, gather, needs)

        self.up_update = update(problem.up_update, True, needs.up_factors)
        self.down_update = update(problem.down_update, False, needs.down_factors)

    def _add(self, product: torch.Tensor, addition: Addition) -> torch.Tensor:
        return add_update(self.products, product, addition)

    def _project_up(self) -> torch.Tensor:
        """Computes h (A, C)."""
        h = self.products.gathered(self.problem.x, self.problem.up, self.problem.up_bias)
        return h if self.up_update is None else self._add(h, self.up_update.forward(self.problem.x))

    def forward(self, keep_h: bool) -> Combined:
        """Computes the output and h."""
        problem = self.problem
        h = self._project_up()
        acted = h.new_empty(len(h), problem.down.shape[2])
        ACTIVATIONS[problem.activation].forward(h, problem.constants, acted)
        rows = self.products.rows(acted, problem.down, problem.down_bias)
        if self.down_update is not None:
            rows = self._add(rows, self.down_update.forward(acted))
        output = self.products.combine(rows, problem.weight).to(problem.x.dtype)
        return Combined(output, h if keep_h else h[:0].clone())

    def backward(self, grad: torch.Tensor, h: torch.Tensor) -> Gradients:
        """Computes the gradients from that of the output (T, H) and from h, which is computed again if it is empty."""
        problem, products, needs = self.problem, self.products, self.needs
        h = h if len(h) else self._project_up()
        factor = problem.weight.flatten()[products.order.assignment][:, None]
        # (A, I), without the combine weight
        grad_acted = products.gathered(grad, problem.down.transpose(1, 2), None).float()
        if self.down_update is not None:
            grad_acted = self._add(grad_acted, self.down_update.backward(grad))
        acted, grad_h = torch.empty_like(grad_acted, dtype=problem.x.dtype), torch.empty_like(h)
        ACTIVATIONS[problem.activation].backward(
            h, (grad_acted * factor).to(problem.x.dtype), problem.constants, acted, grad_h
        )
        grad_weight = self._grad_weight((grad_acted * acted).sum(dim=-1), grad) if needs.weight else None
        del grad_acted
        acted = (acted * factor).to(problem.x.dtype)
        grad_x = self._grad_x(grad_h) if needs.x else None
        up_factors = down_factors = FactorGradients()
        if self.up_update is not None:
            self.up_update.accumulate(grad_h, problem.x)
            up_factors = self.up_update.gradients()
        if self.down_update is not None:
            self.down_update.accumulate(grad, acted)
            down_factors = self.down_update.gradients()
        up_bias, down_bias = problem.up_bias, problem.down_bias
        return Gradients(
            x=grad_x,
            weight=grad_weight,
            up=products.outer(grad_h, problem.x, problem.up, "right") if needs.up else None,
            down=products.outer(grad, acted, problem.down, "left") if needs.down else None,
            up_bias=products.bias_gradient(grad_h, None, up_bias) if needs.up_bias and up_bias is not None else None,
            down_bias=(
                products.bias_gradient(grad, problem.weight, down_bias)
                if needs.down_bias and down_bias is not None
                else None
            ),
            up_a=up_factors.a,
            up_b=up_factors.b,
            down_a=down_factors.a,
            down_b=down_factors.b,
        )

    def _grad_x(self, grad_h: torch.Tensor) -> torch.Tensor:
        """Computes the gradient of x (T, H)."""
        rows = self.products.rows(grad_h, self.problem.up.transpose(1, 2), None)
        if self.up_update is not None:
            rows = self._add(rows, self.up_update.backward(grad_h))
        return self.products.combine(rows, None).to(self.problem.x.dtype)

    def _grad_weight(self, slope: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Computes the gradient of the combine weights (T, K) from each row's <grad W, a> (A,), without the bias."""
        problem, order = self.problem, self.products.order
        if problem.down_bias is not None:
            grad_rows = grad[order.assignment // problem.top_k]
            slope += (grad_rows * problem.down_bias[expert_of_row(order)]).sum(dim=-1, dtype=torch.float32)
        row = row_of_assignment(order.assignment)
        return torch.where(row < order.offsets[-1], slope[row], 0).view_as(problem.weight)
