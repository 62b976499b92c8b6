# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts composed of whole products over all rows, for back ends that bring such products.

# T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
# R rank of a low-rank update, padded here; N rows and M columns of a matrix
"""

from typing import Protocol

import torch
from torch.nn.functional import pad

from ..gates import GATES
from ..low_rank import LowRank
from ..token_order import Slots, invert


# ranks are filled up to a multiple of 16 bytes in 16 bits, as `grouped_mm` wants
RANK_STEP = 8


class Products(Protocol):
    """What a back end brings, for one grouping of the slots. Rows past the last one served may hold anything: they are
    read by nothing but `combine`, which leaves them out."""

    slots: Slots

    def gathered(self, source: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Each row's token of source (T, M) times the expert's matrix (E, N, M), plus bias (E, N): (S, N)."""
        ...

    def rows(self, left: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same of left (S, M)."""
        ...

    def outer(self, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor, gather: str) -> torch.Tensor:
        """Each expert's leftᵀ right, in a tensor like (E, N, M), 0 for an idle one; `gather` says which of the two is
        (T, .) rather than (S, .): "left", "right" or "neither"."""
        ...

    def bias_gradient(self, rows: torch.Tensor, weight: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Each expert's sum of rows (S, N), or of weight (T, K) times rows (T, N), in a tensor like (E, N)."""
        ...

    def combine(self, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """(T, H): each token's rows of (S, H), times weight (T, K) if there is one, added up in fp32."""
        ...


def expert_of_row(slots: Slots) -> torch.Tensor:
    """(S,) the expert of each row, the last one's for rows past the end."""
    rows = torch.arange(len(slots.order), device=slots.order.device, dtype=torch.int32)
    return torch.searchsorted(slots.offsets[1:-1].contiguous(), rows, right=True)


class _Update:
    """A low-rank update by a back end's products; `source` below is (T, M) if `gather`, else (S, M)."""

    def __init__(self, low_rank: LowRank, products: Products, dtype: torch.dtype, gather: bool):
        self.low_rank, self.products, self.gather = low_rank, products, gather
        missing = -low_rank.a.shape[1] % RANK_STEP
        self.a = pad(low_rank.a.to(dtype), (0, 0, 0, missing))
        self.b = pad(low_rank.b.to(dtype), (0, missing)).contiguous()
        self.kept = low_rank.kept
        if self.kept is not None and not gather:
            self.kept = self.kept[products.slots.order]

    def _dropped(self, source: torch.Tensor) -> torch.Tensor:
        return source if self.kept is None else source * self.kept

    def _narrow(self, source: torch.Tensor) -> torch.Tensor:
        multiply = self.products.gathered if self.gather else self.products.rows
        return multiply(self._dropped(source), self.a, None)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """What the update adds to the rows (S, N)."""
        return self.products.rows(self._narrow(source), self.b, None).mul_(self.low_rank.scaling)

    def receive(self, grad: torch.Tensor) -> None:
        """Takes the gradient of the output: (S, N) if `gather`, else (T, N)."""
        multiply = self.products.rows if self.gather else self.products.gathered
        self.grad_narrow = multiply(grad, self.b.transpose(1, 2), None)  # (S, R)

    def backward(self) -> torch.Tensor:
        """What it adds to the gradient of the rows (S, M)."""
        rows = self.products.rows(self.grad_narrow, self.a.transpose(1, 2), None).mul_(self.low_rank.scaling)
        if self.kept is None:
            return rows
        return rows.mul_(self.kept[self._tokens()] if self.gather else self.kept)

    def _tokens(self) -> torch.Tensor:
        return self.products.slots.order // (len(self.products.slots.order) // len(self.kept))

    def gradients(self, grad: torch.Tensor, source: torch.Tensor, needs: list[bool]) -> list:
        """Of a and b; `source` of an update that does not gather carries the row's weight."""
        low_rank, grad_a, grad_b = self.low_rank, None, None
        rank, outer = low_rank.a.shape[1], self.products.outer
        if needs[0]:
            like = torch.empty_like(self.a, dtype=low_rank.a.dtype)
            side = "right" if self.gather else "neither"
            grad_a = outer(self.grad_narrow, self._dropped(source), like, side)[:, :rank] * low_rank.scaling
        if needs[1]:
            like = torch.empty_like(self.b, dtype=low_rank.b.dtype)
            side = "neither" if self.gather else "left"
            grad_b = outer(grad, self._narrow(source), like, side)[..., :rank] * low_rank.scaling
            grad_b = torch.empty_like(low_rank.b).copy_(grad_b)
        return [grad_a, grad_b]


def _updates(low_rank, products: Products, dtype: torch.dtype) -> tuple[_Update | None, _Update | None]:
    up, down = low_rank or (None, None)
    return up and _Update(up, products, dtype, True), down and _Update(down, products, dtype, False)


def _first(products: Products, x, up, up_bias, up_update: _Update | None) -> torch.Tensor:
    """h (S, C)."""
    h = products.gathered(x, up, up_bias)
    return h if up_update is None else h.add_(up_update.forward(x))


def forward(products: Products, x, weight, up, down, up_bias, down_bias, gate, constants, keep_h, low_rank):
    """As [`~modeling_moe.dispatch.backends.loop.forward`]."""
    up_update, down_update = _updates(low_rank, products, x.dtype)
    h = _first(products, x, up, up_bias, up_update)
    acted = h.new_empty(len(h), down.shape[2])
    GATES[gate].forward(h, constants, acted)
    rows = products.rows(acted, down, down_bias)
    if down_update is not None:
        rows += down_update.forward(acted)
    return products.combine(rows, weight).to(x.dtype), h if keep_h else h[:0].clone()


def backward(products: Products, grad, x, h, weight, up, down, up_bias, down_bias, gate, constants, needs, low_rank):
    """As [`~modeling_moe.dispatch.backends.loop.backward`]."""
    need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias, *need_factors = needs
    slots = products.slots
    up_update, down_update = _updates(low_rank, products, x.dtype)
    if not len(h):
        h = _first(products, x, up, up_bias, up_update)
    factor = weight.flatten()[slots.order][:, None]
    back = products.gathered(grad, down.transpose(1, 2), None).float()  # (S, I), without the weight
    if down_update is not None:
        down_update.receive(grad)
        back += down_update.backward()
    acted, grad_h = torch.empty_like(back, dtype=x.dtype), torch.empty_like(h)
    GATES[gate].backward(h, (back * factor).to(x.dtype), constants, acted, grad_h)
    gradients: list[torch.Tensor | None] = [None] * 10
    if need_weight:
        gradients[1] = _weight_slopes(slots, (back * acted).sum(dim=-1), grad, down_bias, weight)
    del back
    if up_update is not None:
        up_update.receive(grad_h)
        gradients[6:8] = up_update.gradients(grad_h, x, need_factors[:2])
    if need_x:
        grad_states = products.rows(grad_h, up.transpose(1, 2), None)
        if up_update is not None:
            grad_states += up_update.backward()
        gradients[0] = products.combine(grad_states, None).to(x.dtype)
    acted = (acted * factor).to(x.dtype)
    if down_update is not None:
        gradients[8:] = down_update.gradients(grad, acted, need_factors[2:])
    gradients[2] = products.outer(grad_h, x, up, "right") if need_up else None
    gradients[3] = products.outer(grad, acted, down, "left") if need_down else None
    gradients[4] = products.bias_gradient(grad_h, None, up_bias) if need_up_bias else None
    gradients[5] = products.bias_gradient(grad, weight, down_bias) if need_down_bias else None
    return gradients


def _weight_slopes(slots: Slots, slope, grad, down_bias, weight) -> torch.Tensor:
    """The gradient of weight (T, K), from that of each row's without the bias (S,)."""
    if down_bias is not None:
        grad_rows = grad[slots.order // weight.shape[1]]
        slope += (grad_rows * down_bias[expert_of_row(slots)]).sum(dim=-1, dtype=torch.float32)
    place = invert(slots.order)
    return torch.where(place < slots.offsets[-1], slope[place], 0).view_as(weight)
