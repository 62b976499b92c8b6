# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `loop`: expert by expert, plain GEMMs on rows that fit the cache. The CPU's, and right on any device.

# T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
"""

import ctypes
import itertools
import sys
from typing import NamedTuple

import torch

from .gates import GATES
from .slots import Slots


# rows that pass an expert at once: bounds the temporaries when every token chooses the same expert
CHUNK = 1024
# of Linux, bytes and advice
PAGE, MADV_HUGEPAGE = 4096, 14


def math_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype to multiply in: that of `x`, or fp32 on a CPU without instructions for it, where its GEMM is emulated
    and several times slower than casting to fp32 and back."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if x.device.type == "cpu" and x.dtype in native and not native[x.dtype]():
        return torch.float32
    return x.dtype


def _in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks Linux to back fresh memory by huge pages: the faults of ordinary ones take a tenth of the time that a
    training step's products do."""
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.nbytes >= 1 << 22:
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return tensor


class _Scratch:
    """Memory for the temporaries of one chunk, used by one chunk after another: it stays in the cache."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, rows: int):
        self.like, self.dtype, self.rows = like, dtype, rows
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns), whatever the last chunk left there."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.rows, columns, dtype=self.dtype)
        return self.buffers[name][:rows]

    def gather(self, name: str, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows `index` of `source`, in the dtype of the products."""
        if source.dtype != self.dtype:
            return source.index_select(0, index).to(self.dtype)
        return torch.index_select(source, 0, index, out=self.take(name, len(index), source.shape[1]))


class _Chunk(NamedTuple):
    """Rows of one expert: how many, and whether they are its first and its last."""

    expert: int
    rows: int
    first: bool
    last: bool


def _chunks(slots: Slots) -> list[_Chunk]:
    """The served rows of `slots`, in their order."""
    offsets = slots.offsets.tolist()
    return [
        _Chunk(expert, min(CHUNK, end - row), row == start, row + CHUNK >= end)
        for expert, (start, end) in enumerate(itertools.pairwise(offsets))
        for row in range(start, end, CHUNK)
    ]


def _project(states: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(states, matrix.T, out=out) if bias is None else torch.addmm(bias, states, matrix.T, out=out)


class _Experts:
    """Matrices and biases in the dtype of the products, one expert at a time."""

    def __init__(self, dtype: torch.dtype, *tensors: torch.Tensor | None):
        self.dtype, self.expert = dtype, None
        self.tensors = [None if tensor is None else tensor.unbind(0) for tensor in tensors]

    def __getitem__(self, expert: int) -> list[torch.Tensor | None]:
        if expert != self.expert:
            self.current = [None if each is None else each[expert].to(self.dtype) for each in self.tensors]
            self.expert = expert
        return self.current


def forward(x, slots, weight, up, down, up_bias, down_bias, gate, constants, keep_h):
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

    Returns:
        (T, H), and h (S, C) in the order of `slots`, or (0, C) if it is not kept.
    """
    dtype, chunks = math_dtype(x), _chunks(slots)
    (_, columns, hidden), width = up.shape, down.shape[2]
    output = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    h = _in_huge_pages(x.new_empty(len(slots.order) if keep_h else 0, columns))
    scratch = _Scratch(x, dtype, max((chunk.rows for chunk in chunks), default=0))
    experts = _Experts(dtype, up, down, up_bias, down_bias)
    sizes = [chunk.rows for chunk in chunks]
    order = slots.order[: sum(sizes)]
    tokens, weights = (order // weight.shape[1]).split(sizes), weight.flatten()[order].to(dtype)[:, None].split(sizes)
    kept = h[: sum(sizes)].split(sizes) if keep_h else [None] * len(sizes)
    for chunk, token, factor, keep in zip(chunks, tokens, weights, kept, strict=True):
        up_matrix, down_matrix, up_row, down_row = experts[chunk.expert]
        direct = keep is not None and keep.dtype == dtype
        before = keep if direct else scratch.take("h", chunk.rows, columns)
        _project(scratch.gather("states", x, token), up_matrix, up_row, before)
        if keep is not None and not direct:
            keep.copy_(before)
        acted = scratch.take("acted", chunk.rows, width)
        GATES[gate].forward(before, constants, acted)
        # the weight goes onto the narrow side: w (a W) = (w a) W
        states = torch.mm(acted.mul_(factor), down_matrix.T, out=scratch.take("output", chunk.rows, hidden))
        if down_row is not None:
            states.addr_(factor[:, 0], down_row)
        output.index_add_(0, token, states.to(output.dtype))
    return output.to(x.dtype), h


class _WeightGradient:
    """Gradient of one kind of expert matrix, summed over an expert's chunks in the dtype of the products."""

    def __init__(self, weights: torch.Tensor, dtype: torch.dtype, offsets: torch.Tensor):
        self.total = _in_huge_pages(torch.empty_like(weights))
        self.parts = self.total.unbind(0)
        for expert in torch.where(offsets[1:] == offsets[:-1])[0].tolist():
            self.parts[expert].zero_()
        self.scratch = None if weights.dtype == dtype else torch.empty_like(weights[0], dtype=dtype)

    def add(self, chunk: _Chunk, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds leftᵀ right, of one chunk."""
        into = self.parts[chunk.expert] if self.scratch is None else self.scratch
        if chunk.first:
            torch.mm(left.T, right, out=into)
        else:
            into.addmm_(left.T, right)
        if chunk.last and self.scratch is not None:
            self.parts[chunk.expert].copy_(self.scratch)


def backward(grad, x, h, slots, weight, up, down, up_bias, down_bias, gate, constants, needs):
    """Gradients of [`forward`].

    Args:
        grad: (T, H), of the output.
        h: as `forward` returned it; recomputed if it was not kept.
        needs: which gradients are wanted, of x, weight, up, down, up_bias and down_bias.

    Returns:
        A list of the six, None where not wanted. An idle expert's are zeros, and so are an empty slot's weight's.
    """
    dtype, chunks, wide = math_dtype(x), _chunks(slots), torch.promote_types(x.dtype, torch.float32)
    (_, columns, hidden), width = up.shape, down.shape[2]
    need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = needs
    grad_x = torch.zeros_like(x, dtype=wide) if need_x else None
    grad_up = _WeightGradient(up, dtype, slots.offsets) if need_up else None
    grad_down = _WeightGradient(down, dtype, slots.offsets) if need_down else None
    grad_up_bias = torch.zeros_like(up_bias, dtype=wide) if need_up_bias else None
    grad_down_bias = torch.zeros_like(down_bias, dtype=wide) if need_down_bias else None
    scratch = _Scratch(x, dtype, max((chunk.rows for chunk in chunks), default=0))
    experts = _Experts(dtype, up, down, up_bias, down_bias)
    sizes = [chunk.rows for chunk in chunks]
    order = slots.order[: sum(sizes)]
    tokens, weights = (order // weight.shape[1]).split(sizes), weight.flatten()[order].to(dtype)[:, None].split(sizes)
    kept = h[: sum(sizes)].split(sizes) if len(h) else [None] * len(sizes)
    slopes = torch.zeros_like(order, dtype=weight.dtype)
    for chunk, token, factor, keep, slope in zip(chunks, tokens, weights, kept, slopes.split(sizes), strict=True):
        up_matrix, down_matrix, up_row, down_row = experts[chunk.expert]
        states = scratch.gather("states", x, token) if need_up or keep is None else None
        if keep is not None:
            before = keep.to(dtype)
        else:
            before = _project(states, up_matrix, up_row, scratch.take("h", chunk.rows, columns))
        grad_y = scratch.gather("grad_y", grad, token)
        back = torch.mm(grad_y, down_matrix, out=scratch.take("back", chunk.rows, width))  # without the weight
        grad_a = torch.mul(back, factor, out=scratch.take("grad_a", chunk.rows, width))
        acted, grad_h = scratch.take("acted", chunk.rows, width), scratch.take("grad_h", chunk.rows, columns)
        GATES[gate].backward(before, grad_a, constants, acted, grad_h)
        if need_weight:
            # <dO, a W> = <dO Wᵀ, a>: the expert's output is not needed
            torch.sum(back.mul_(acted), dim=-1, dtype=slope.dtype, out=slope)
            if down_row is not None:
                slope += grad_y @ down_row
        if need_x:
            grad_states = torch.mm(grad_h, up_matrix, out=scratch.take("grad_states", chunk.rows, hidden))
            grad_x.index_add_(0, token, grad_states.to(wide))
        if need_up:
            grad_up.add(chunk, grad_h, states)
        if need_down:
            grad_down.add(chunk, grad_y, acted.mul_(factor))
        if need_up_bias:
            grad_up_bias[chunk.expert] += grad_h.sum(dim=0)
        if need_down_bias:
            grad_down_bias[chunk.expert] += grad_y.T @ factor[:, 0]
    return [
        grad_x.to(x.dtype) if need_x else None,
        torch.zeros_like(weight).view(-1).index_copy_(0, order.long(), slopes).view_as(weight)
        if need_weight
        else None,
        grad_up.total if need_up else None,
        grad_down.total if need_down else None,
        grad_up_bias.to(up_bias.dtype) if need_up_bias else None,
        grad_down_bias.to(down_bias.dtype) if need_down_bias else None,
    ]


def decode(x, index, weight, up, down, up_bias, down_bias, gate, constants):
    """[`forward`] for a few tokens: nothing is sorted on the device, and only the chosen experts' weights are read.

    Args:
        index: (T, K), on the CPU.

    Returns:
        (T, H).
    """
    ids, num_experts = index.flatten().tolist(), len(up)
    served = sorted((slot for slot, expert in enumerate(ids) if 0 <= expert < num_experts), key=ids.__getitem__)
    slots = torch.tensor(served, dtype=torch.long)
    tokens = slots // index.shape[1]
    bounds = [row for row, slot in enumerate(served) if row == 0 or ids[slot] != ids[served[row - 1]]] + [len(served)]
    groups = [(ids[served[start]], slice(start, end)) for start, end in itertools.pairwise(bounds)]

    states = x[tokens]
    h, acted = x.new_empty(len(served), up.shape[1]), x.new_empty(len(served), down.shape[2])
    for expert, rows in groups:
        _project_few(states[rows], up[expert], None if up_bias is None else up_bias[expert], h[rows])
    GATES[gate].forward(h, constants, acted)
    for expert, rows in groups:
        _project_few(acted[rows], down[expert], None if down_bias is None else down_bias[expert], states[rows])
    weighted = states.to(weight.dtype) * weight.flatten()[slots][:, None]
    return torch.zeros_like(x, dtype=weight.dtype).index_add_(0, tokens, weighted).to(x.dtype)


def _project_few(states: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """As `_project`, bound by reading the matrix: for 2 to some rows, BLAS reads it faster as the left factor."""
    if len(states) == 1:
        _project(states, matrix, bias, out)
    else:
        out.copy_((matrix @ states.T).T)
        if bias is not None:
            out += bias
