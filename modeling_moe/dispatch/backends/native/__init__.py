# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `native`: experts.c, the CPU's where there is a gcc. Its products are its own: the rows of one expert are
too few for BLAS to do its best, and gathering, the gate, the weights and adding up are parts of them.

# T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...low_rank import LowRank, LowRankPair
from ...token_order import Slots
from ..cpu_memory import in_huge_pages
from ..loop_gradients import rank_first, rank_last
from .compiling import native_library


# gate in `GATES` -> kind (as gate.h numbers them), gated, paired
KINDS = {name: number for number, name in enumerate(["silu", "gelu_tanh", "relu", "relu2"])}
NATIVE_GATES = {
    **{name: (kind, 0, 0) for name, kind in KINDS.items()},
    **{f"{name}_gated": (kind, 1, 0) for name, kind in KINDS.items()},
    "clamped_swiglu_gated": (4, 1, 0),
    "clamped_swiglu_pairs": (4, 1, 1),
}


class _Matrices(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("expert", "stride", "transposed"))]

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> "_Matrices":
        """Of (E, N, M), whose rows or columns are contiguous."""
        if tensor is None:
            return cls()
        transposed = tensor.stride(2) != 1
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1 + transposed), transposed)


class _Gate(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("kind", "gated", "paired")] + [
        (name, ctypes.c_double) for name in ("alpha", "limit")
    ]


class _LowRank(ctypes.Structure):
    _fields_ = [("a", _Matrices), ("b", _Matrices), ("rank", ctypes.c_long)] + [
        (name, ctypes.c_void_p) for name in ("narrow", "grad_narrow")
    ]


class _Problem(ctypes.Structure):
    _pointers = ("x", "up_bias", "down_bias", "factor", "offsets", "token")
    _sizes = ("tokens", "top_k", "hidden", "columns", "width", "experts", "threads")
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _pointers),
        *((name, ctypes.c_long) for name in _sizes),
        ("up", _Matrices),
        ("down", _Matrices),
        ("gate", _Gate),
        ("low_up", _LowRank),
        ("low_down", _LowRank),
        *((name, ctypes.c_long) for name in ("begin", "end", "first")),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "h", "grad_h", "a", "slope", "grad_x")),
        ("grad_up", _Matrices),
        ("grad_down", _Matrices),
        *((name, ctypes.c_void_p) for name in ("grad_up_bias", "grad_down_bias")),
        *((name, _Matrices) for name in ("up_a", "up_b", "down_a", "down_b")),
    ]


# of experts.c's functions; a pointer is an address
_ARGUMENTS = {
    "scratch_words": [ctypes.c_void_p],
    "wave_rows": [ctypes.c_void_p],
    "forward": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, *[ctypes.c_void_p] * 3],
    "backward": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p],
    "decode": [ctypes.c_void_p] * 5,
}


def _declare(library: ctypes.CDLL | None) -> Any:
    """The same library, which knows the types of its functions now."""
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_long if name in ("scratch_words", "wave_rows") else None
    return library


@functools.cache
def _library(dtype: torch.dtype) -> Any:
    return _declare(native_library(dtype))


@torch.compiler.assume_constant_result
def available(dtype: torch.dtype, gate: str | None) -> bool:
    """Whether experts of that dtype with that gate can be computed here."""
    return gate in NATIVE_GATES and _library(dtype) is not None


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or not tensor.numel() else tensor.data_ptr()


def _in_lines(matrices: torch.Tensor) -> torch.Tensor:
    """The same with contiguous rows or columns."""
    return matrices if 1 in matrices.stride()[1:] else matrices.contiguous()


class _Call:
    """One call of experts.c: its arguments, and the tensors that they point into."""

    def __init__(self, x, top_k, up, down, up_bias, down_bias, gate, constants, rows=(None, None, None)):
        self.x, self.rows, self.library = x.contiguous(), rows, _library(x.dtype)
        self.up, self.down = _in_lines(up), _in_lines(down)
        self.biases = [None if bias is None else bias.contiguous() for bias in (up_bias, down_bias)]
        # in the order of `_Problem`
        pointers = map(_address, (self.x, *self.biases, *rows))
        sizes = (len(x), top_k, x.shape[1], up.shape[1], down.shape[2], len(up), torch.get_num_threads())
        matrices = (_Matrices.of(self.up), _Matrices.of(self.down))
        self.problem = _Problem(*pointers, *sizes, *matrices, _Gate(*NATIVE_GATES[gate], *constants))
        self.address = ctypes.addressof(self.problem)
        self.updates: list[_Update | None] = [None, None]
        self.wave = 0

    def scratch(self) -> tuple[torch.Tensor, int]:
        """Of all threads, and how many words of it each one has."""
        words = self.library.scratch_words(self.address)
        return self.new(self.problem.threads * words, dtype=torch.float32), words

    def new(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory, in the dtype of x unless said."""
        return in_huge_pages(self.x.new_empty(size, dtype=dtype))


class _Update:
    """A [`~modeling_moe.dispatch.low_rank.LowRank`] without dropout, as experts.c has it."""

    def __init__(self, low_rank: LowRank, count: int, like: torch.Tensor, backward: bool):
        self.low_rank = low_rank
        self.a = low_rank.a.to(like.dtype).contiguous()
        # the scaling is a factor of b's, so that only one of the two knows it
        self.b = rank_first(low_rank.b.to(like.dtype)).mul(low_rank.scaling)
        rank = self.a.shape[1]
        self.narrow, self.grad_narrow = like.new_empty(count, rank), like.new_empty(count if backward else 0, rank)
        matrices = _Matrices.of(self.a), _Matrices.of(_rows_first(self.b))
        self.structure = _LowRank(*matrices, rank, _address(self.narrow), _address(self.grad_narrow))

    def want(self, needs: Sequence[bool]) -> list[_Matrices]:
        """Memory for the gradients of a and of b that are wanted."""
        self.grad_a, self.grad_b = (
            torch.empty_like(factor) if needed else None
            for factor, needed in zip((self.a, self.b), needs, strict=True)
        )
        return [_Matrices.of(self.grad_a), _Matrices.of(None if self.grad_b is None else _rows_first(self.grad_b))]

    def gradients(self) -> list[torch.Tensor | None]:
        """What is there now, as the factors lie and in their dtype."""
        a, b, scaling = self.low_rank[:3]
        return [
            None if self.grad_a is None else self.grad_a.to(a.dtype),
            None if self.grad_b is None else torch.empty_like(b).copy_(rank_last(self.grad_b).mul(scaling)),
        ]


def _rows_first(b: torch.Tensor) -> torch.Tensor:
    """(R, E, N) as (E, N, R)."""
    return b.permute(1, 2, 0)


def _grouped(x, slots: Slots, weight, *experts: Any, low_rank: LowRankPair | None, backward: bool) -> _Call:
    top_k = weight.shape[1]
    rows = (weight.flatten()[slots.order], slots.offsets, slots.order // top_k)
    call = _Call(x, top_k, *experts, rows=rows)
    call.wave = call.library.wave_rows(call.address)
    call.updates = [update and _Update(update, call.wave, x, backward) for update in low_rank or (None, None)]
    for name, update in zip(("low_up", "low_down"), call.updates, strict=True):
        if update is not None:
            setattr(call.problem, name, update.structure)
    return call


def forward(x, slots, weight, up, down, up_bias, down_bias, gate, constants, keep_h, low_rank=None):
    """As [`~modeling_moe.dispatch.backends.loop.forward`]; a low-rank update has no dropout."""
    experts = (up, down, up_bias, down_bias, gate, constants)
    call = _grouped(x, slots, weight, *experts, low_rank=low_rank, backward=False)
    h, acted = call.new(len(slots.order) if keep_h else 0, up.shape[1]), call.new(call.wave, down.shape[2])
    output = call.new(*x.shape, dtype=torch.float32).zero_()
    scratch, words = call.scratch()
    addresses = (_address(h), _address(acted), output.data_ptr())
    call.library.forward(call.address, scratch.data_ptr(), words, *addresses)
    return output.to(x.dtype), h


def backward(grad, x, h, slots, weight, up, down, up_bias, down_bias, gate, constants, needs, low_rank=None):
    """As [`~modeling_moe.dispatch.backends.loop.backward`]; a low-rank update has no dropout."""
    experts, h = (up, down, up_bias, down_bias, gate, constants), h.contiguous()
    call = _grouped(x, slots, weight, *experts, low_rank=low_rank, backward=True)
    grad_x = call.new(*x.shape, dtype=torch.float32).zero_() if needs[0] else None
    slope = weight.new_zeros(len(slots.order)) if needs[1] else None
    grad_experts = [
        in_huge_pages(torch.empty_like(tensor)) if needed else None
        for needed, tensor in zip(needs[2:6], (call.up, call.down, *call.biases), strict=True)
    ]
    wanted_factors = [
        matrices
        for update, wanted in zip(call.updates, (needs[6:8], needs[8:10]), strict=True)
        for matrices in ([_Matrices(), _Matrices()] if update is None else update.want(wanted))
    ]
    grad_h, acted = call.new(call.wave, up.shape[1]), call.new(call.wave, down.shape[2])
    addresses = map(_address, (grad, h, grad_h, acted, slope, grad_x))
    grad_up, grad_down, *grad_biases = grad_experts
    matrices = (_Matrices.of(grad_up), _Matrices.of(grad_down))
    gradients = _Gradients(*addresses, *matrices, *map(_address, grad_biases), *wanted_factors)
    scratch, words = call.scratch()
    call.library.backward(call.address, scratch.data_ptr(), words, ctypes.addressof(gradients))
    grad_x = None if grad_x is None else grad_x.to(x.dtype)
    grad_weight = None if slope is None else slope.index_copy(0, slots.order.long(), slope).view_as(weight)
    grad_factors = [
        grad for update in call.updates for grad in ([None, None] if update is None else update.gradients())
    ]
    return [grad_x, grad_weight, *grad_experts, *grad_factors]


def decode(x, index, weight, up, down, up_bias, down_bias, gate, constants):
    """As [`~modeling_moe.dispatch.backends.loop_decode.decode`]."""
    call = _Call(x, index.shape[1], up, down, up_bias, down_bias, gate, constants)
    index, weight, output = index.long().contiguous(), weight.contiguous(), torch.empty_like(call.x)
    words = x.numel() + index.numel() * (up.shape[1] + down.shape[2])
    scratch = torch.empty(words, dtype=torch.float32)
    addresses = (tensor.data_ptr() for tensor in (index, weight, scratch, output))
    call.library.decode(call.address, *addresses)
    return output
