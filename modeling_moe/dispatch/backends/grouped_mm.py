# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `grouped_mm` uses torch's grouped matrix product, without a synchronisation with the host. It serves GPUs
where Triton is missing.

`grouped_mm` leaves the rows after the last offset unwritten, in outputs and gradients. Only `combine` reads these rows,
and it masks them.

# T tokens, K experts per token, A = T*K assignments, E experts
"""

import torch
from torch.nn.functional import grouped_mm

from ..backend import Backend
from ..expert_order import ExpertOrder, by_assignment, expert_of_row
from ..problem import Combined, ExpertsProblem, Gradients, Needs
from .grouped_passes import GroupedPass, LayerProducts, Side


def takes_rows(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> bool:
    """Returns True if `grouped_mm` takes the dtype of `x` and the sizes of the matrices, whose rows must be multiples
    of 16 bytes."""
    sizes = (*up.shape[1:], *down.shape[1:])
    return x.dtype != torch.float64 and all(size * x.element_size() % 16 == 0 for size in sizes)


class GroupedMMBackend(Backend):
    """GroupedMMBackend computes the experts by torch's `grouped_mm`."""

    name = "grouped_mm"
    default_devices = ("cuda",)

    def reason_unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why torch's grouped matrix product does not serve a dtype, or None if it does."""
        return "it does not multiply float64" if dtype == torch.float64 else None

    def reason_unsupported(self, problem: ExpertsProblem) -> str | None:
        """Returns why the back end cannot compute a problem, or None if it can."""
        if takes_rows(problem.x, problem.up, problem.down):
            return None
        unavailable = self.reason_unavailable(problem.x.device, problem.x.dtype)
        return unavailable or "rows of the experts' matrices are not multiples of 16 bytes"

    def forward(self, problem: ExpertsProblem, order: ExpertOrder, keep_h: bool) -> Combined:
        """Computes the experts as described at [`~modeling_moe.dispatch.backend.Backend.forward`]."""
        return GroupedPass(problem, _GroupedProducts(order, problem.top_k), Needs()).forward(keep_h)

    def backward(
        self, problem: ExpertsProblem, order: ExpertOrder, grad: torch.Tensor, h: torch.Tensor, needs: Needs
    ) -> Gradients:
        """Computes gradients as described at [`~modeling_moe.dispatch.backend.Backend.backward`]."""
        return GroupedPass(problem, _GroupedProducts(order, problem.top_k), needs).backward(grad, h)

    def multiplies(self, states: torch.Tensor, matrices: torch.Tensor) -> bool:
        """Returns True if torch's grouped product takes the dtype and the sizes."""
        return takes_rows(states, matrices, matrices)

    def products(self, order: ExpertOrder, top_k: int) -> LayerProducts:
        """Returns the products of an order, as [`~modeling_moe.dispatch.backend.Backend.products`] describes them."""
        return _GroupedProducts(order, top_k)


class _GroupedProducts(LayerProducts):
    """_GroupedProducts implements [`~modeling_moe.dispatch.backends.grouped_passes.Products`] by `grouped_mm`.

    It gathers each source once.
    """

    def __init__(self, order: ExpertOrder, top_k: int):
        self.order, self.top_k, self.tokens = order, top_k, order.assignment // top_k
        self.known: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _gather(self, source: torch.Tensor) -> torch.Tensor:
        for known, rows in self.known:
            if known is source:
                return rows
        self.known.append((source, source[self.tokens]))
        return self.known[-1][1]

    def gathered(self, source: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.rows(self._gather(source), matrices, bias)

    def rows(self, left: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        product = grouped_mm(left, matrices.transpose(1, 2), offs=self.order.offsets[1:])
        return product if bias is None else product.add_(bias[expert_of_row(self.order)])

    def outer(self, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor, gather: Side) -> torch.Tensor:
        left = self._gather(left) if gather == "left" else left
        right = self._gather(right) if gather == "right" else right
        product = grouped_mm(left.T, right, offs=self.order.offsets[1:])
        # the product of an idle expert is garbage on some GPUs: https://github.com/pytorch/pytorch/issues/172439
        idle = self.order.offsets[1:] == self.order.offsets[:-1]
        return torch.empty_like(like).copy_(product.masked_fill_(idle[:, None, None], 0))

    def bias_gradient(self, rows: torch.Tensor, weight: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if weight is not None:
            rows = self._gather(rows) * weight.flatten()[self.order.assignment][:, None]
        places = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
        # rows of empty assignments are summed into one more expert, which is cut off
        expert = torch.searchsorted(self.order.offsets[1:].contiguous(), places, right=True)
        total = torch.zeros(len(like) + 1, like.shape[1], device=like.device, dtype=torch.float32)
        return total.index_add_(0, expert, rows.float())[:-1].to(like.dtype)

    def combine(self, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        rows = by_assignment(rows, self.order).float().view(-1, self.top_k, rows.shape[-1])
        return rows.sum(dim=1) if weight is None else (rows * weight[..., None]).sum(dim=1)
