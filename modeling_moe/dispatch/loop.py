# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `loop`: expert by expert, plain GEMMs on rows that fit the cache. The CPU's, and right on any device.

# T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
"""

from collections.abc import Iterator

import torch

from .gates import GATES
from .slots import Slots


# rows that pass an expert at once: bounds the temporaries when every token chooses the same expert
CHUNK = 1024


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


class _Scratch:
    """Memory for the temporaries of one chunk, used by one chunk after another: fresh pages cost as much as a GEMM."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, offsets: torch.Tensor):
        self.rows = min(CHUNK, int(offsets.diff().max()))
        self.like, self.dtype, self.buffers = like, dtype, {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns), whatever the last chunk left there."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.rows * columns, dtype=self.dtype)
        return self.buffers[name][: rows * columns].view(rows, columns)

    def gather(self, name: str, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows `index` of `source`, in the dtype of the products."""
        if source.dtype != self.dtype:
            return source.index_select(0, index).to(self.dtype)
        return torch.index_select(source, 0, index, out=self.take(name, len(index), source.shape[1]))


def _chunks(slots: Slots) -> Iterator[tuple[int, list[slice]]]:
    """Each expert that has rows, and its rows in chunks."""
    offsets = slots.offsets.tolist()
    for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
        if start < end:
            yield expert, [slice(row, min(row + CHUNK, end)) for row in range(start, end, CHUNK)]


def _project(states: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(states, matrix.T, out=out) if bias is None else torch.addmm(bias, states, matrix.T, out=out)


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
    dtype, scratch = math_dtype(x), _Scratch(x, math_dtype(x), slots.offsets)
    (_, columns, hidden), width = up.shape, down.shape[2]
    output = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    h = x.new_empty(len(slots.order) if keep_h else 0, columns)
    tokens, weight = slots.order // weight.shape[1], weight.flatten()[slots.order].to(dtype)[:, None]
    for expert, chunks in _chunks(slots):
        up_matrix, down_matrix = up[expert].to(dtype), down[expert].to(dtype)
        up_row = None if up_bias is None else up_bias[expert].to(dtype)
        for rows in chunks:
            token, count = tokens[rows], rows.stop - rows.start
            direct = keep_h and h.dtype == dtype
            states = scratch.gather("states", x, token)
            states = _project(states, up_matrix, up_row, h[rows] if direct else scratch.take("h", count, columns))
            if keep_h and not direct:
                h[rows] = states
            acted = scratch.take("acted", count, width)
            GATES[gate].forward(states, constants, acted)
            # the weight goes onto the narrow side: w (a W) = (w a) W
            states = torch.mm(acted.mul_(weight[rows]), down_matrix.T, out=scratch.take("output", count, hidden))
            if down_bias is not None:
                states.addr_(weight[rows, 0], down_bias[expert].to(dtype))
            output.index_add_(0, token, states.to(output.dtype))
    return output.to(x.dtype), h


class _WeightGradient:
    """Gradient of one kind of expert matrix, summed over an expert's chunks in the dtype of the products."""

    def __init__(self, weights: torch.Tensor, dtype: torch.dtype, offsets: torch.Tensor):
        self.total = torch.empty_like(weights)
        for expert in torch.where(offsets[1:] == offsets[:-1])[0].tolist():
            self.total[expert] = 0
        self.scratch = None if weights.dtype == dtype else torch.empty_like(weights[0], dtype=dtype)

    def add(self, expert: int, left: torch.Tensor, right: torch.Tensor, first: bool, last: bool) -> None:
        """Adds leftᵀ right, of one chunk."""
        into = self.total[expert] if self.scratch is None else self.scratch
        if first:
            torch.mm(left.T, right, out=into)
        else:
            into.addmm_(left.T, right)
        if last and self.scratch is not None:
            self.total[expert] = self.scratch


def backward(grad, x, h, slots, weight, up, down, up_bias, down_bias, gate, constants, needs):
    """Gradients of [`forward`].

    Args:
        grad: (T, H), of the output.
        h: as `forward` returned it; recomputed if it was not kept.
        needs: which gradients are wanted, of x, weight, up, down, up_bias and down_bias.

    Returns:
        A list of the six, None where not wanted. An idle expert's are zeros, and so are an empty slot's weight's.
    """
    dtype, scratch = math_dtype(x), _Scratch(x, math_dtype(x), slots.offsets)
    wide = torch.promote_types(x.dtype, torch.float32)
    (_, columns, hidden), width = up.shape, down.shape[2]
    need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = needs
    grad_x = torch.zeros_like(x, dtype=wide) if need_x else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    grad_up = _WeightGradient(up, dtype, slots.offsets) if need_up else None
    grad_down = _WeightGradient(down, dtype, slots.offsets) if need_down else None
    grad_up_bias = torch.zeros_like(up_bias, dtype=wide) if need_up_bias else None
    grad_down_bias = torch.zeros_like(down_bias, dtype=wide) if need_down_bias else None
    tokens, weights = slots.order // weight.shape[1], weight.flatten()[slots.order].to(dtype)[:, None]
    for expert, chunks in _chunks(slots):
        up_matrix, down_matrix = up[expert].to(dtype), down[expert].to(dtype)
        for rows in chunks:
            token, count, ends = tokens[rows], rows.stop - rows.start, (rows is chunks[0], rows is chunks[-1])
            states = scratch.gather("states", x, token) if need_up or not len(h) else None
            if len(h):
                before = h[rows].to(dtype)
            else:
                up_row = None if up_bias is None else up_bias[expert].to(dtype)
                before = _project(states, up_matrix, up_row, scratch.take("h", count, columns))
            grad_y = scratch.gather("grad_y", grad, token)
            back = torch.mm(grad_y, down_matrix, out=scratch.take("back", count, width))  # without the weight
            grad_a = torch.mul(back, weights[rows], out=scratch.take("grad_a", count, width))
            acted, grad_h = scratch.take("acted", count, width), scratch.take("grad_h", count, columns)
            GATES[gate].backward(before, grad_a, constants, acted, grad_h)
            if need_weight:
                # <dO, a W> = <dO Wᵀ, a>: the expert's output is not needed
                slope = back.mul_(acted).sum(dim=-1)
                if down_bias is not None:
                    slope += grad_y @ down_bias[expert].to(dtype)
                grad_weight.view(-1).index_copy_(0, slots.order[rows].long(), slope.to(weight.dtype))
            if need_x:
                grad_states = torch.mm(grad_h, up_matrix, out=scratch.take("grad_states", count, hidden))
                grad_x.index_add_(0, token, grad_states.to(wide))
            if need_up:
                grad_up.add(expert, grad_h, states, *ends)
            if need_down:
                grad_down.add(expert, grad_y, acted.mul_(weights[rows]), *ends)
            if need_up_bias:
                grad_up_bias[expert] += grad_h.sum(dim=0)
            if need_down_bias:
                grad_down_bias[expert] += grad_y.T @ weights[rows, 0]
    return [
        grad_x.to(x.dtype) if need_x else None,
        grad_weight,
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
    groups = [(ids[served[start]], slice(start, end)) for start, end in zip(bounds, bounds[1:])]

    states = x[tokens]
    h, acted = x.new_empty(len(served), up.shape[1]), x.new_empty(len(served), down.shape[2])
    for expert, rows in groups:
        _project(states[rows], up[expert], None if up_bias is None else up_bias[expert], h[rows])
    GATES[gate].forward(h, constants, acted)
    for expert, rows in groups:
        _project(acted[rows], down[expert], None if down_bias is None else down_bias[expert], states[rows])
    weighted = states.to(weight.dtype) * weight.flatten()[slots][:, None]
    return torch.zeros_like(x, dtype=weight.dtype).index_add_(0, tokens, weighted).to(x.dtype)
