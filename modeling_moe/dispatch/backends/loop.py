# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `loop`: expert by expert, plain GEMMs on rows that fit the cache. Right on any device and in any dtype; the
CPU's where `native` does not serve.

# T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..gates import GATES
from ..low_rank import LowRankPair
from ..token_order import Slots
from .cpu_memory import Scratch, in_huge_pages, math_dtype
from .loop_decode import decode
from .loop_gradients import Chunk, Update
from .loop_gradients import WeightGradient as _WeightGradient


__all__ = ["backward", "decode", "forward"]

# rows that pass an expert at once: bounds the temporaries when every token chooses the same expert
CHUNK = 1024


def _chunks(slots: Slots) -> list[Chunk]:
    """The served rows of `slots`, in their order."""
    pieces = (
        (expert, min(CHUNK, end - row), row == start, row + CHUNK >= end)
        for expert, (start, end) in enumerate(itertools.pairwise(slots.offsets.tolist()))
        for row in range(start, end, CHUNK)
    )
    return [Chunk(number, *piece) for number, piece in enumerate(pieces)]


def _project(states: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(states, matrix.T, out=out) if bias is None else torch.addmm(bias, states, matrix.T, out=out)


class _Sweep:
    """One pass over the served rows, chunk by chunk.

    Attributes:
        order: the served slots, in the order of their experts.
        sizes: rows of each chunk.
        scratch: memory that each chunk uses again.
    """

    def __init__(self, x: torch.Tensor, slots: Slots, weight: torch.Tensor, *experts: torch.Tensor | None):
        self.dtype, self.chunks = math_dtype(x), _chunks(slots)
        self.sizes = [chunk.rows for chunk in self.chunks]
        self.order, self.offsets = slots.order[: sum(self.sizes)], slots.offsets
        self.scratch = Scratch(x, self.dtype, max(self.sizes, default=0))
        self.tokens = (self.order // weight.shape[1]).split(self.sizes)
        self.factors = weight.flatten()[self.order].to(self.dtype)[:, None].split(self.sizes)
        self.experts = [None if tensor is None else tensor.unbind(0) for tensor in experts]

    def __iter__(self) -> Iterator[tuple[Chunk, torch.Tensor, torch.Tensor, list[Any]]]:
        """Yields chunk, tokens (R,), weights (R, 1), and the expert's matrices and biases in the products' dtype."""
        current: list[Any] = []
        for chunk, token, factor in zip(self.chunks, self.tokens, self.factors, strict=True):
            if chunk.first:
                current = [None if each is None else each[chunk.expert].to(self.dtype) for each in self.experts]
            yield chunk, token, factor, current

    def updates(self, low_rank: LowRankPair | None, needs: Sequence[bool] = ()) -> tuple[Update, Update]:
        """Of the first matrix and of the second; `needs` as [`backward`] has it for their factors."""
        up, down = low_rank or (None, None)
        return (
            Update(up, self.dtype, self.tokens, needs[:2], self.offsets),
            Update(down, self.dtype, self.order.split(self.sizes), needs[2:], self.offsets),
        )

    def rows_of(self, tensor: torch.Tensor) -> Any:
        """Each chunk's rows of a tensor (S, ...), None for one that is empty."""
        return tensor[: len(self.order)].split(self.sizes) if len(tensor) else [None] * len(self.sizes)


def forward(x, slots, weight, up, down, up_bias, down_bias, gate, constants, keep_h, low_rank=None):
    """Sums over each token's experts, in fp32.

    Args:
        x: (T, H).
        slots: of the T*K slots.
        weight: (T, K) fp32.
        up: (E, C, H).
        down: (E, H, I).
        up_bias: (E, C) or None.
        down_bias: (E, H) or None.
        gate: key of `GATES`.
        constants: of the gate.
        keep_h: whether backward wants h.
        low_rank: [`~modeling_moe.dispatch.low_rank.LowRankPair`] of updates, or None.

    Returns:
        (T, H), and h (S, C) in the order of `slots`, or (0, C) if it is not kept.
    """
    (_, columns, hidden), width = up.shape, down.shape[2]
    output = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    h = in_huge_pages(x.new_empty(len(slots.order) if keep_h else 0, columns))
    sweep = _Sweep(x, slots, weight, up, down, up_bias, down_bias)
    scratch, (up_update, down_update) = sweep.scratch, sweep.updates(low_rank)
    for (chunk, token, factor, current), keep in zip(sweep, sweep.rows_of(h), strict=True):
        up_matrix, down_matrix, up_row, down_row = current
        direct = keep is not None and keep.dtype == sweep.dtype
        before = keep if direct else scratch.take("h", chunk.rows, columns)
        gathered = scratch.gather("states", x, token)
        _project(gathered, up_matrix, up_row, before)
        up_update.add(chunk, gathered, before)
        if keep is not None and not direct:
            keep.copy_(before)
        acted = scratch.take("acted", chunk.rows, width)
        GATES[gate].forward(before, constants, acted)
        # the weight goes onto the narrow side: w (a W) = (w a) W
        states = torch.mm(acted.mul_(factor), down_matrix.T, out=scratch.take("output", chunk.rows, hidden))
        down_update.add(chunk, acted, states)
        if down_row is not None:
            states.addr_(factor[:, 0], down_row)
        output.index_add_(0, token, states.to(output.dtype))
    return output.to(x.dtype), h


def _if(needed: bool, make: Callable[[], Any]) -> Any:
    return make() if needed else None


def backward(grad, x, h, slots, weight, up, down, up_bias, down_bias, gate, constants, needs, low_rank=None):
    """Gradients of [`forward`].

    Args:
        grad: (T, H), of the output.
        h: as `forward` returned it; recomputed if it was not kept.
        needs: which gradients are wanted, of x, weight, up, down, up_bias and down_bias, and with `low_rank` of its a
            and b for up, then for down.

    Returns:
        A list of them, None where not wanted. An idle expert's are zeros, and so are an empty slot's weight's.
    """
    need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias, *need_factors = needs
    (_, columns, hidden), width = up.shape, down.shape[2]
    sweep = _Sweep(x, slots, weight, up, down, up_bias, down_bias)
    scratch, dtype, wide = sweep.scratch, sweep.dtype, torch.promote_types(x.dtype, torch.float32)
    grad_x = _if(need_x, lambda: torch.zeros_like(x, dtype=wide))
    grad_up = _if(need_up, lambda: _WeightGradient(up, dtype, slots.offsets))
    grad_down = _if(need_down, lambda: _WeightGradient(down, dtype, slots.offsets))
    grad_up_bias = _if(need_up_bias, lambda: torch.zeros_like(up_bias, dtype=wide))
    grad_down_bias = _if(need_down_bias, lambda: torch.zeros_like(down_bias, dtype=wide))
    slopes = torch.zeros_like(sweep.order, dtype=weight.dtype)
    up_update, down_update = sweep.updates(low_rank, need_factors)
    need_states = need_up or up_update.trained
    for (chunk, token, factor, current), keep, slope in zip(
        sweep, sweep.rows_of(h), slopes.split(sweep.sizes), strict=True
    ):
        up_matrix, down_matrix, up_row, down_row = current
        states: Any = scratch.gather("states", x, token) if need_states or keep is None else None
        if keep is None:
            keep = _project(states, up_matrix, up_row, scratch.take("h", chunk.rows, columns))
            up_update.add(chunk, states, keep)
        grad_y = scratch.gather("grad_y", grad, token)
        back = torch.mm(grad_y, down_matrix, out=scratch.take("back", chunk.rows, width))  # without the weight
        narrow_down, narrow_up = down_update.add_back(chunk, grad_y, back), None
        grad_a = torch.mul(back, factor, out=scratch.take("grad_a", chunk.rows, width))
        acted, grad_h = scratch.take("acted", chunk.rows, width), scratch.take("grad_h", chunk.rows, columns)
        GATES[gate].backward(keep.to(dtype), grad_a, constants, acted, grad_h)
        if need_weight:
            # <dO, a W> = <dO Wᵀ, a>: the expert's output is not needed
            torch.sum(back.mul_(acted), dim=-1, dtype=slope.dtype, out=slope)
            if down_row is not None:
                slope += grad_y @ down_row
        if need_x:
            grad_states = torch.mm(grad_h, up_matrix, out=scratch.take("grad_states", chunk.rows, hidden))
            narrow_up = up_update.add_back(chunk, grad_h, grad_states)
            grad_x.index_add_(0, token, grad_states.to(wide))
        if need_up:
            grad_up.add(chunk, grad_h, states)
        up_update.add_gradients(chunk, narrow_up, grad_h, states)
        acted.mul_(factor)
        if need_down:
            grad_down.add(chunk, grad_y, acted)
        down_update.add_gradients(chunk, narrow_down, grad_y, acted)
        if need_up_bias:
            grad_up_bias[chunk.expert] += grad_h.sum(dim=0)
        if need_down_bias:
            grad_down_bias[chunk.expert] += grad_y.T @ factor[:, 0]
    return [
        _if(need_x, lambda: grad_x.to(x.dtype)),
        _if(
            need_weight,
            lambda: weight.new_zeros(weight.numel()).index_copy_(0, sweep.order.long(), slopes).view_as(weight),
        ),
        _if(need_up, lambda: grad_up.total),
        _if(need_down, lambda: grad_down.total),
        _if(need_up_bias, lambda: grad_up_bias.to(up_bias.dtype)),
        _if(need_down_bias, lambda: grad_down_bias.to(down_bias.dtype)),
        *up_update.gradients(),
        *down_update.gradients(),
    ]
