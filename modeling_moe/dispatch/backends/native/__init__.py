# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `native` calls experts.c, which serves CPUs where there is a gcc.

The products are written in C because the rows of one expert are too few for BLAS to be fast, and because gathering, the
activation, the combine weights and the sum over experts are parts of the products there.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
# C columns of the first projection; R rank of a low-rank update; W rows of a wave (experts.c)
"""

import ctypes
from collections.abc import Callable

import torch

from ...backend import Backend
from ...expert_order import ExpertOrder
from ...low_rank import FactorGradients, LowRank
from ...problem import Combined, ExpertsProblem, Gradients, Needs
from ...rounds import Rounds, SummedRounds
from ..cpu_memory import in_huge_pages
from ..loop_gradients import rank_first, rank_last
from . import structures
from .compiling import native_library
from .products import NativeProducts
from .structures import NATIVE_ACTIVATIONS, Matrices, with_lines


class NativeBackend(Backend):
    """NativeBackend computes the experts by a compiled library.

    Args:
        load: returns the library for a dtype, or None if there is none.
    """

    name = "native"
    default_devices = ("cpu",)
    serves_slots = True

    def __init__(self, load: Callable[[torch.dtype], ctypes.CDLL | None] = native_library):
        self.load = load

    @torch.compiler.assume_constant_result
    def reason_unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why there is no library for a device and a dtype, or None if there is one."""
        if device.type != "cpu":
            return "it runs on CPUs"
        if dtype not in structures.ELEMENTS:
            return "it computes in float32, bfloat16 and float16"
        return None if self.load(dtype) is not None else "experts.c is not compiled: it needs Linux and gcc"

    def reason_unsupported(self, problem: ExpertsProblem) -> str | None:
        """Returns why the back end cannot compute a problem, or None if it can."""
        if problem.activation not in NATIVE_ACTIVATIONS:
            return "experts.c does not have its activation"
        if problem.drops:
            return "experts.c has no dropout in low-rank updates"
        return self.reason_unavailable(problem.x.device, problem.x.dtype)

    def decodes(self, problem: ExpertsProblem) -> bool:
        """Returns True for matrices with contiguous rows and without updates."""
        return problem.up.stride(-1) == 1 and problem.down.stride(-1) == 1 and not problem.updated

    def forward(self, problem: ExpertsProblem, order: ExpertOrder, keep_h: bool) -> Combined:
        """Computes the experts as described at [`~modeling_moe.dispatch.backend.Backend.forward`]."""
        output = in_huge_pages(problem.x.new_empty(problem.x.shape, dtype=torch.float32)).zero_()
        h = self._forward(problem, order, output, keep_h)
        return Combined(output.to(problem.x.dtype), h)

    def multiplies(self, states: torch.Tensor, matrices: torch.Tensor) -> bool:
        """Returns True if there is a library for the dtype."""
        return self.reason_unavailable(states.device, states.dtype) is None

    def products(self, order: ExpertOrder, top_k: int) -> NativeProducts:
        """Returns the products of an order, as [`~modeling_moe.dispatch.backend.Backend.products`] describes them."""
        return NativeProducts(order, top_k, self._library)

    def rounds(self, problem: ExpertsProblem, index: torch.Tensor, decode: bool) -> Rounds:
        """Returns rounds as described at [`~modeling_moe.dispatch.backend.Backend.rounds`]."""
        return SummedRounds(problem, index, self._add_decoded if decode else self._add)

    def _add(self, problem: ExpertsProblem, index: torch.Tensor, total: torch.Tensor) -> None:
        """Adds the output to `total` (T, H) in fp32."""
        self._forward(problem, self.order_by_expert(index, problem.num_experts), total, keep_h=False)

    def _forward(self, problem: ExpertsProblem, order: ExpertOrder, total: torch.Tensor, keep_h: bool) -> torch.Tensor:
        """Adds the output to `total` (T, H) in fp32 and returns h."""
        call = _WaveCall(problem, order, self._library(problem.x.dtype), Needs(), backward=False)
        h = call.new(len(order.assignment) if keep_h else 0, problem.up.shape[1])
        acted = call.new(call.wave, problem.down.shape[2])
        scratch, words = call.scratch()
        targets = (_address(h), _address(acted), total.data_ptr())
        call.library.experts_forward(call.address, scratch.data_ptr(), words, *targets)
        return h

    def backward(
        self, problem: ExpertsProblem, order: ExpertOrder, grad: torch.Tensor, h: torch.Tensor, needs: Needs
    ) -> Gradients:
        """Computes gradients as described at [`~modeling_moe.dispatch.backend.Backend.backward`]."""
        grad_x = in_huge_pages(problem.x.new_empty(problem.x.shape, dtype=torch.float32)).zero_() if needs.x else None
        gradients = self.add_gradients(problem, order, grad, h, needs, grad_x)
        return gradients._replace(x=None if grad_x is None else grad_x.to(problem.x.dtype))

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
        call, weight = _WaveCall(problem, order, self._library(problem.x.dtype), needs, backward=True), problem.weight
        slope = weight.new_zeros(len(order.assignment)) if needs.weight else None
        grad_up, grad_down = _like(call.up, needs.up), _like(call.down, needs.down)
        grad_up_bias, grad_down_bias = _like(call.up_bias, needs.up_bias), _like(call.down_bias, needs.down_bias)
        grad_h, acted = call.new(call.wave, problem.up.shape[1]), call.new(call.wave, problem.down.shape[2])
        h = h.contiguous()
        gradients = structures.Gradients(
            *map(_address, (grad, h, grad_h, acted, slope, grad_x)),
            Matrices.of(grad_up),
            Matrices.of(grad_down),
            *map(_address, (grad_up_bias, grad_down_bias)),
            *call.factor_targets(),
        )
        scratch, words = call.scratch()
        call.library.experts_backward(call.address, scratch.data_ptr(), words, ctypes.addressof(gradients))
        up, down = (FactorGradients() if update is None else update.gradients() for update in call.updates)
        return Gradients(
            weight=None if slope is None else slope.index_copy(0, order.assignment.long(), slope).view_as(weight),
            up=grad_up,
            down=grad_down,
            up_bias=grad_up_bias,
            down_bias=grad_down_bias,
            up_a=up.a,
            up_b=up.b,
            down_a=down.a,
            down_b=down.b,
        )

    def decode(self, problem: ExpertsProblem, index: torch.Tensor) -> torch.Tensor:
        """Computes the output as described at [`~modeling_moe.dispatch.backend.Backend.decode`]."""
        call = _Call(problem, self._library(problem.x.dtype))
        output = torch.empty_like(call.x)
        call.decode(call.library.experts_decode, index, problem.weight, output.numel(), output)
        return output

    def _add_decoded(self, problem: ExpertsProblem, index: torch.Tensor, total: torch.Tensor) -> None:
        """Adds the output of `decode` to `total` (T, H) in fp32."""
        call = _Call(problem, self._library(problem.x.dtype))
        call.decode(call.library.experts_decode_into, index, problem.weight, 0, total)

    def _library(self, dtype: torch.dtype) -> ctypes.CDLL:
        library = self.load(dtype)
        if library is None:
            raise RuntimeError(f"Back end native has no library for {dtype}: call reason_unavailable first.")
        return library


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or not tensor.numel() else tensor.data_ptr()


def _like(tensor: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
    """Returns memory for the gradient of a tensor if it is needed."""
    return in_huge_pages(torch.empty_like(tensor)) if needed and tensor is not None else None


class _Call:
    """_Call holds the arguments of one call of experts.c, and the tensors that they point into."""

    def __init__(
        self,
        problem: ExpertsProblem,
        library: ctypes.CDLL,
        rows: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
    ):
        """Points to the tensors of a problem; `rows` are factor, offsets and token of experts.c's Problem."""
        self.library, self.rows = library, rows
        self.x, self.up, self.down = problem.x.contiguous(), with_lines(problem.up), with_lines(problem.down)
        self.up_bias = None if problem.up_bias is None else problem.up_bias.contiguous()
        self.down_bias = None if problem.down_bias is None else problem.down_bias.contiguous()
        experts, (_, columns, hidden) = problem.num_experts, self.up.shape
        tokens, top_k = problem.weight.shape
        self.threads = torch.get_num_threads()
        # in the order of the structure's fields
        self.problem = structures.Problem(
            *map(_address, (self.x, self.up_bias, self.down_bias, *rows)),
            *(tokens, top_k, hidden, columns, self.down.shape[2], experts, self.threads),
            Matrices.of(self.up, problem.slots),
            Matrices.of(self.down, problem.slots),
            structures.Activation(*NATIVE_ACTIVATIONS[problem.activation], *problem.constants),
        )
        self.address = ctypes.addressof(self.problem)

    def decode(
        self, function: Callable[..., None], index: torch.Tensor, weight: torch.Tensor, words: int, to: torch.Tensor
    ) -> None:
        """Calls a function of C that decodes; its scratch has room for `words` floats beside h and the activations."""
        index, weight = index.long().contiguous(), weight.contiguous()
        words += index.numel() * (self.up.shape[1] + self.down.shape[2])
        scratch = torch.empty(words, dtype=torch.float32)
        function(self.address, index.data_ptr(), weight.data_ptr(), scratch.data_ptr(), to.data_ptr())

    def scratch(self) -> tuple[torch.Tensor, int]:
        """Returns the scratch of all threads, and the number of words of each one."""
        words = self.library.scratch_words(self.address)
        return self.new(self.threads * words, dtype=torch.float32), words

    def new(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns uninitialised memory, by default in the dtype of x."""
        return in_huge_pages(self.x.new_empty(size, dtype=dtype))


class _WaveCall(_Call):
    """_WaveCall is a call of forward or backward, which work in waves.

    Attributes:
        wave: the number W of rows of the largest wave.
        updates: the low-rank updates of the two matrices.
    """

    def __init__(
        self, problem: ExpertsProblem, order: ExpertOrder, library: ctypes.CDLL, needs: Needs, backward: bool
    ):
        factor, token = problem.weight.flatten()[order.assignment], order.assignment // problem.top_k
        super().__init__(problem, library, (factor, order.offsets, token))
        self.wave: int = library.wave_rows(self.address)
        self.updates: list[_NativeUpdate | None] = [None, None]
        if problem.up_update is not None:
            self.updates[0] = _NativeUpdate(problem.up_update, self.wave, self.x, needs.up_factors, backward)
            self.problem.up_update = self.updates[0].structure
        if problem.down_update is not None:
            self.updates[1] = _NativeUpdate(problem.down_update, self.wave, self.x, needs.down_factors, backward)
            self.problem.down_update = self.updates[1].structure

    def factor_targets(self) -> list[Matrices]:
        """Returns where C writes the gradients of the factors a and b of `up`, then of `down`."""
        return [
            target
            for update in self.updates
            for target in ((Matrices(), Matrices()) if update is None else update.targets())
        ]


class _NativeUpdate:
    """_NativeUpdate lays out a low-rank update for experts.c, which does the steps of
    [`~modeling_moe.dispatch.low_rank.Update`] inside its products.

    Args:
        low_rank: an update without dropout.
        wave: the number W of rows of the largest wave.
        like: a tensor in the dtype of the products.
        needs: which of the gradients of a and b are needed.
        backward: True to give memory to the gradient of a x.
    """

    def __init__(self, low_rank: LowRank, wave: int, like: torch.Tensor, needs: tuple[bool, bool], backward: bool):
        self.low_rank = low_rank
        self.a = low_rank.a.to(like.dtype).contiguous()
        # b carries the scaling, so that C needs none
        self.b = rank_first(low_rank.b.to(like.dtype)).mul(low_rank.scaling)
        rank = self.a.shape[1]
        self.states, self.grad_states = like.new_empty(wave, rank), like.new_empty(wave if backward else 0, rank)
        matrices = Matrices.of(self.a), Matrices.of(_rows_first(self.b))
        self.structure = structures.LowRank(*matrices, rank, _address(self.states), _address(self.grad_states))
        self.grad_a = torch.empty_like(self.a) if needs[0] else None
        self.grad_b = torch.empty_like(self.b) if needs[1] else None

    def targets(self) -> tuple[Matrices, Matrices]:
        """Returns where C writes the gradients of a and b."""
        return Matrices.of(self.grad_a), Matrices.of(None if self.grad_b is None else _rows_first(self.grad_b))

    def gradients(self) -> FactorGradients:
        """Returns the gradients that C wrote, in the layout and the dtype of the factors."""
        a, b = self.low_rank.a, self.low_rank.b
        return FactorGradients(
            None if self.grad_a is None else self.grad_a.to(a.dtype),
            None
            if self.grad_b is None
            else torch.empty_like(b).copy_(rank_last(self.grad_b).mul(self.low_rank.scaling)),
        )


def _rows_first(b: torch.Tensor) -> torch.Tensor:
    """Permutes (R, E, N) to (E, N, R)."""
    return b.permute(1, 2, 0)
