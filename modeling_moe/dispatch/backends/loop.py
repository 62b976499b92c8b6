# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `loop` multiplies expert by expert, in plain GEMMs on rows that fit the cache. It is right on any device and
in any dtype, and serves CPUs where `native` does not.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
# C columns of the first projection; R rows of a chunk
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..activations import ACTIVATIONS
from ..backend import Backend
from ..expert_order import ExpertOrder
from ..low_rank import FactorGradients, LowRank
from ..problem import Combined, ExpertsProblem, Gradients, Needs
from ..rounds import Rounds, SummedRounds
from .cpu_memory import Scratch, in_huge_pages, math_dtype
from .loop_decode import DecodedRows, decode
from .loop_gradients import Chunk, ChunkRows, ChunkUpdate, WeightGradient, add_to
from .loop_products import LoopProducts


class LoopBackend(Backend):
    """LoopBackend computes the experts by a loop over chunks of their rows.

    Args:
        chunk_rows: the most rows of a chunk, which bounds the temporaries when every token chooses the same expert.
        product_dtype: returns the dtype to multiply tokens in.
    """

    name = "loop"
    serves_slots = True

    def __init__(self, chunk_rows: int = 1024, product_dtype: Callable[[torch.Tensor], torch.dtype] = math_dtype):
        self.chunk_rows, self.product_dtype = chunk_rows, product_dtype

    def _split(self, problem: ExpertsProblem, order: ExpertOrder) -> "_Split":
        return _Split(_chunks(order, self.chunk_rows), self.product_dtype(problem.x))

    def decodes(self, problem: ExpertsProblem) -> bool:
        """Returns True unless an update has dropout."""
        return not problem.drops

    def decode(self, problem: ExpertsProblem, index: torch.Tensor) -> torch.Tensor:
        """Computes the output as described at [`~modeling_moe.dispatch.backend.Backend.decode`]."""
        return decode(problem, index)

    def forward(self, problem: ExpertsProblem, order: ExpertOrder, keep_h: bool) -> Combined:
        """Computes the experts as described at [`~modeling_moe.dispatch.backend.Backend.forward`]."""
        output = torch.zeros_like(problem.x, dtype=problem.wide_dtype)
        h = _Forward(problem, order, self._split(problem, order)).run(output, keep_h)
        return Combined(output.to(problem.x.dtype), h)

    def backward(
        self, problem: ExpertsProblem, order: ExpertOrder, grad: torch.Tensor, h: torch.Tensor, needs: Needs
    ) -> Gradients:
        """Computes gradients as described at [`~modeling_moe.dispatch.backend.Backend.backward`]."""
        grad_x = torch.zeros_like(problem.x, dtype=problem.wide_dtype) if needs.x else None
        gradients = self.add_gradients(problem, order, grad, h, needs, grad_x)
        return gradients._replace(x=_in_dtype_of(problem.x, grad_x))

    def add_gradients(
        self,
        problem: ExpertsProblem,
        order: ExpertOrder,
        grad: torch.Tensor,
        h: torch.Tensor,
        needs: Needs,
        grad_x: torch.Tensor | None,
    ) -> Gradients:
        """Computes gradients as described at [`~modeling_moe.dispatch.backend.Backend.add_gradients`]."""
        problem.refuse_gradients_of_slots(needs)
        return _Backward(problem, order, self._split(problem, order), grad, needs, grad_x).run(h)

    def multiplies(self, states: torch.Tensor, matrices: torch.Tensor) -> bool:
        """Returns True if asked: the loop serves any device and dtype."""
        return True

    def products(self, order: ExpertOrder, top_k: int) -> LoopProducts:
        """Returns the products of an order, as [`~modeling_moe.dispatch.backend.Backend.products`] describes them."""
        return LoopProducts(order, top_k, self.product_dtype)

    def rounds(self, problem: ExpertsProblem, index: torch.Tensor, decode: bool) -> Rounds:
        """Returns rounds as described at [`~modeling_moe.dispatch.backend.Backend.rounds`]."""
        return DecodedRows(problem, index) if decode else SummedRounds(problem, index, self._add)

    def _add(self, problem: ExpertsProblem, index: torch.Tensor, total: torch.Tensor) -> None:
        """Adds the output to `total` (T, H) in `wide_dtype`."""
        order = self.order_by_expert(index, problem.num_experts)
        _Forward(problem, order, self._split(problem, order)).run(total, keep_h=False)


def _chunks(order: ExpertOrder, chunk_rows: int) -> list[Chunk]:
    """Splits the rows that belong to experts into chunks."""
    pieces = (
        (expert, min(chunk_rows, end - row), row == start, row + chunk_rows >= end)
        for expert, (start, end) in enumerate(itertools.pairwise(order.offsets.tolist()))
        for row in range(start, end, chunk_rows)
    )
    return [Chunk(number, *piece) for number, piece in enumerate(pieces)]


class _Split(NamedTuple):
    """_Split says how the rows are worked on.

    Attributes:
        chunks: the chunks of all rows that belong to experts.
        dtype: the dtype of the products.
    """

    chunks: list[Chunk]
    dtype: torch.dtype


def _in_dtype_of(tensor: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None or grad is None else grad.to(tensor.dtype)


class _Expert(NamedTuple):
    """_Expert holds the matrices and biases of one expert in the dtype of the products."""

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


class _Work(NamedTuple):
    """_Work is what one chunk is computed from.

    Attributes:
        chunk: the chunk.
        token: (R,) the token of each row.
        factor: (R, 1) the combine weight of each row.
        expert: the expert's matrices.
        h: (R, C), the chunk's part of a tensor of h, or None if that is empty.
    """

    chunk: Chunk
    token: torch.Tensor
    factor: torch.Tensor
    expert: _Expert
    h: torch.Tensor | None


class _Pass:
    """_Pass walks over all chunks.

    Attributes:
        assignment: the assignments that have an expert, in expert order.
        sizes: the number of rows of each chunk.
        scratch: memory that each chunk uses again.
    """

    def __init__(self, problem: ExpertsProblem, order: ExpertOrder, split: _Split, needs: Needs):
        self.problem, self.order, self.needs = problem, order, needs
        self.chunks, self.dtype = split
        self.sizes = [chunk.rows for chunk in self.chunks]
        self.assignment = order.assignment[: sum(self.sizes)]
        self.scratch = Scratch(problem.x, self.dtype, max(self.sizes, default=0))
        self.tokens = (self.assignment // problem.top_k).split(self.sizes)
        self.factors = problem.weight.flatten()[self.assignment].to(self.dtype)[:, None].split(self.sizes)
        self.up_update = self._update(problem.up_update, self.tokens, needs.up_factors)
        self.down_update = self._update(problem.down_update, self.assignment.split(self.sizes), needs.down_factors)

    def _update(
        self, low_rank: LowRank | None, kept_rows: tuple[torch.Tensor, ...], needs: tuple[bool, bool]
    ) -> ChunkUpdate | None:
        if low_rank is None:
            return None
        return ChunkUpdate(low_rank, self.dtype, kept_rows, self.order, needs)

    def _work(self, h: torch.Tensor) -> Iterator[_Work]:
        """Yields the work of each chunk; `h` is (A, C) or empty."""
        problem = self.problem
        up, down = problem.up.unbind(0), problem.down.unbind(0)
        up_bias = None if problem.up_bias is None else problem.up_bias.unbind(0)
        down_bias = None if problem.down_bias is None else problem.down_bias.unbind(0)
        places: Sequence[int] = range(len(up)) if problem.slots is None else problem.slots.tolist()
        parts: list[torch.Tensor | None] = [None] * len(self.sizes)
        if len(h):
            parts = list(h[: len(self.assignment)].split(self.sizes))
        expert: _Expert | None = None
        for chunk, token, factor, part in zip(self.chunks, self.tokens, self.factors, parts, strict=True):
            if expert is None or chunk.first:
                number = places[chunk.expert]
                expert = _Expert(
                    up[number].to(self.dtype),
                    down[number].to(self.dtype),
                    None if up_bias is None else up_bias[number].to(self.dtype),
                    None if down_bias is None else down_bias[number].to(self.dtype),
                )
            yield _Work(chunk, token, factor, expert, part)

    def _project_up(self, work: _Work, states: torch.Tensor, h: torch.Tensor) -> None:
        """Writes h (R, C) from the gathered tokens (R, H)."""
        matrix, bias = work.expert.up, work.expert.up_bias
        if bias is None:
            torch.mm(states, matrix.T, out=h)
        else:
            torch.addmm(bias, states, matrix.T, out=h)
        if self.up_update is not None:
            add_to(h, self.up_update.forward(ChunkRows(work.chunk, states)))


class _Forward(_Pass):
    """_Forward computes the experts' output."""

    def __init__(self, problem: ExpertsProblem, order: ExpertOrder, split: _Split):
        super().__init__(problem, order, split, Needs())

    def run(self, output: torch.Tensor, keep_h: bool) -> torch.Tensor:
        """Adds the sum over each token's experts to `output` (T, H) in `wide_dtype` and returns h."""
        problem = self.problem
        rows = len(self.order.assignment) if keep_h else 0
        h = in_huge_pages(problem.x.new_empty(rows, problem.up.shape[1]))
        for work in self._work(h):
            output.index_add_(0, work.token, self._chunk(work).to(output.dtype))
        return h

    def _chunk(self, work: _Work) -> torch.Tensor:
        """Computes the weighted output (R, H) of one chunk, and writes `work.h` if it is there."""
        problem, scratch, chunk = self.problem, self.scratch, work.chunk
        direct = work.h is not None and work.h.dtype == self.dtype
        h = work.h if work.h is not None and direct else scratch.take("h", chunk.rows, problem.up.shape[1])
        self._project_up(work, scratch.gather("states", problem.x, work.token), h)
        if work.h is not None and not direct:
            work.h.copy_(h)
        acted = scratch.take("acted", chunk.rows, problem.down.shape[2])
        ACTIVATIONS[problem.activation].forward(h, problem.constants, acted)
        # the weight goes onto the side with fewer columns: w (a W) = (w a) W
        output = scratch.take("output", chunk.rows, problem.x.shape[1])
        torch.mm(acted.mul_(work.factor), work.expert.down.T, out=output)
        if self.down_update is not None:
            add_to(output, self.down_update.forward(ChunkRows(chunk, acted)))
        if work.expert.down_bias is not None:
            output.addr_(work.factor[:, 0], work.expert.down_bias)
        return output


class _Backward(_Pass):
    """_Backward computes the gradients that are needed.

    Args:
        grad: (T, H), the gradient of the output.
        grad_x: (T, H) in `wide_dtype`, to which the gradient of x is added, or None.
    """

    def __init__(
        self,
        problem: ExpertsProblem,
        order: ExpertOrder,
        split: _Split,
        grad: torch.Tensor,
        needs: Needs,
        grad_x: torch.Tensor | None,
    ):
        super().__init__(problem, order, split, needs)
        self.grad, self.grad_x, wide = grad, grad_x, problem.wide_dtype
        self.slopes = torch.zeros_like(self.assignment, dtype=problem.weight.dtype)
        self.grad_up = WeightGradient(problem.up, self.dtype, order) if needs.up else None
        self.grad_down = WeightGradient(problem.down, self.dtype, order) if needs.down else None
        self.grad_up_bias = self.grad_down_bias = None
        if needs.up_bias and problem.up_bias is not None:
            self.grad_up_bias = torch.zeros_like(problem.up_bias, dtype=wide)
        if needs.down_bias and problem.down_bias is not None:
            self.grad_down_bias = torch.zeros_like(problem.down_bias, dtype=wide)

    def run(self, h: torch.Tensor) -> Gradients:
        """Computes the gradients; an empty h is computed again."""
        for work, slope in zip(self._work(h), self.slopes.split(self.sizes), strict=True):
            self._chunk(work, slope)
        return self._results()

    def _chunk(self, work: _Work, slope: torch.Tensor) -> None:
        """Adds one chunk's part to all gradients, and writes `slope` (R,), the gradient of the combine weights."""
        problem, scratch, chunk, dtype = self.problem, self.scratch, work.chunk, self.dtype
        columns, width, h = problem.up.shape[1], problem.down.shape[2], work.h
        states: torch.Tensor | None = None
        if h is None or self.needs.up or any(self.needs.up_factors):
            states = scratch.gather("states", problem.x, work.token)
            if h is None:
                h = scratch.take("h", chunk.rows, columns)
                self._project_up(work, states, h)
        grad_y = scratch.gather("grad_y", self.grad, work.token)
        back = scratch.take("back", chunk.rows, width)  # without the combine weight
        torch.mm(grad_y, work.expert.down, out=back)
        if self.down_update is not None:
            add_to(back, self.down_update.backward(ChunkRows(chunk, grad_y)))
        grad_a = torch.mul(back, work.factor, out=scratch.take("grad_a", chunk.rows, width))
        acted, grad_h = scratch.take("acted", chunk.rows, width), scratch.take("grad_h", chunk.rows, columns)
        ACTIVATIONS[problem.activation].backward(h.to(dtype), grad_a, problem.constants, acted, grad_h)
        if self.needs.weight:
            # <dO, a W> = <dO Wᵀ, a>: the expert's output is not needed
            torch.sum(back.mul_(acted), dim=-1, dtype=slope.dtype, out=slope)
            if work.expert.down_bias is not None:
                slope += grad_y @ work.expert.down_bias
        self._add_to_x(work, grad_h)
        self._add_to_parameters(work, states, grad_h, acted.mul_(work.factor), grad_y)

    def _add_to_x(self, work: _Work, grad_h: torch.Tensor) -> None:
        """Adds one chunk's part to the gradient of x."""
        if self.grad_x is None:
            return
        grad_states = self.scratch.take("grad_states", work.chunk.rows, self.problem.x.shape[1])
        torch.mm(grad_h, work.expert.up, out=grad_states)
        if self.up_update is not None:
            add_to(grad_states, self.up_update.backward(ChunkRows(work.chunk, grad_h)))
        self.grad_x.index_add_(0, work.token, grad_states.to(self.grad_x.dtype))

    def _add_to_parameters(
        self, work: _Work, states: torch.Tensor | None, grad_h: torch.Tensor, acted: torch.Tensor, grad_y: torch.Tensor
    ) -> None:
        """Adds one chunk's part to the gradients of matrices, biases and factors; `acted` carries the weight."""
        chunk = work.chunk
        if states is not None:
            if self.grad_up is not None:
                self.grad_up.add(chunk, grad_h, states)
            if self.up_update is not None:
                self.up_update.accumulate(ChunkRows(chunk, grad_h), ChunkRows(chunk, states))
        if self.grad_down is not None:
            self.grad_down.add(chunk, grad_y, acted)
        if self.down_update is not None:
            self.down_update.accumulate(ChunkRows(chunk, grad_y), ChunkRows(chunk, acted))
        if self.grad_up_bias is not None:
            self.grad_up_bias[chunk.expert] += grad_h.sum(dim=0)
        if self.grad_down_bias is not None:
            self.grad_down_bias[chunk.expert] += grad_y.T @ work.factor[:, 0]

    def _results(self) -> Gradients:
        """Returns the sums in the dtypes of the inputs."""
        problem, weight = self.problem, self.problem.weight
        up = FactorGradients() if self.up_update is None else self.up_update.gradients()
        down = FactorGradients() if self.down_update is None else self.down_update.gradients()
        grad_weight = None
        if self.needs.weight:
            flat = weight.new_zeros(weight.numel()).index_copy_(0, self.assignment.long(), self.slopes)
            grad_weight = flat.view_as(weight)
        return Gradients(
            weight=grad_weight,
            up=None if self.grad_up is None else self.grad_up.total,
            down=None if self.grad_down is None else self.grad_down.total,
            up_bias=_in_dtype_of(problem.up_bias, self.grad_up_bias),
            down_bias=_in_dtype_of(problem.down_bias, self.grad_down_bias),
            up_a=up.a,
            up_b=up.b,
            down_a=down.a,
            down_b=down.b,
        )
