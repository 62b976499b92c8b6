# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts of a few tokens as matrix-vector products, which read each chosen expert once and sort nothing.

The names of shapes and arguments stand in this package's docstring; index (T, K), where an id outside [0, E) is empty.
"""

import triton
import triton.language as tl

from .pieces import gate, load_tile


@triton.jit
def decode_up(
    x, index, up, stride_e, stride_c, stride_h, bias, a, num_experts, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a (S, I) = gate(up_e x[token] + bias_e), one slot per program; an empty slot's row is left as it is."""
    WIDTH: tl.constexpr = BLOCK_N * 2 if LAYOUT == "pairs" else BLOCK_N
    limit_n = inner * 2 if LAYOUT == "pairs" else inner
    num_columns = inner if LAYOUT == "plain" else inner * 2
    slot = tl.program_id(0)
    expert = tl.load(index + slot).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, BLOCK_K)
    up_pointers = up + expert * stride_e + columns[:, None] * stride_c + depth[None, :] * stride_h
    x += slot // TOP_K * hidden
    first = tl.full((WIDTH, BLOCK_K), 0.0, tl.float32)
    second = tl.full((WIDTH, BLOCK_K), 0.0, tl.float32)
    for k in range(0, hidden, BLOCK_K):
        taken = tl.load(x + k + depth, mask=k + depth < hidden, other=0.0).to(tl.float32)[None, :]
        pointers = up_pointers + k * stride_h
        first += taken * load_tile(pointers, columns, k + depth, limit_n, hidden, EVEN).to(tl.float32)
        if LAYOUT == "halves":
            weights = load_tile(pointers + inner * stride_c, columns, k + depth, limit_n, hidden, EVEN)
            second += taken * weights.to(tl.float32)
    g = tl.sum(first, axis=1)
    u = tl.sum(second, axis=1)
    if bias is not None:
        bias_pointers = bias + expert * num_columns + columns
        g += tl.load(bias_pointers, mask=columns < limit_n, other=0.0).to(tl.float32)
        if LAYOUT == "halves":
            u += tl.load(bias_pointers + inner, mask=columns < limit_n, other=0.0).to(tl.float32)
    if LAYOUT == "pairs":
        g, u = tl.split(tl.reshape(g, (BLOCK_N, 2)))
    acted, _, _ = gate(g, u, alpha, limit, ACTIVATION, LAYOUT)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(a + slot * inner + columns, acted, mask=columns < inner)


@triton.jit
def decode_down(
    a, index, weight, down, stride_e, stride_h, stride_i, bias, out, num_experts, hidden, inner,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (T, H) = sum over a token's slots of weight * (down_e a + bias_e), one token per program."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    result = tl.full((BLOCK_N,), 0.0, tl.float32)
    for first in range(0, TOP_K, UNROLL):
        # unrolled, so that the numbers of all these experts are asked for before the first matrix is
        for step in tl.static_range(UNROLL):
            choice = first + step
            slot = token * TOP_K + choice
            expert = tl.load(index + slot, mask=choice < TOP_K, other=0).to(tl.int64)
            # no branch: of an empty slot no column and no depth is read
            served = (choice < TOP_K) & (expert >= 0) & (expert < num_experts)
            width = tl.where(served, hidden, 0)
            length = tl.where(served, inner, 0)
            share = tl.load(weight + slot, mask=served, other=0.0)
            down_pointers = down + expert * stride_e + columns[:, None] * stride_h + depth[None, :] * stride_i
            total = tl.full((BLOCK_N, BLOCK_K), 0.0, tl.float32)
            for k in range(0, inner, BLOCK_K):
                inside = k + depth < length
                taken = tl.load(a + slot * inner + k + depth, mask=inside, other=0.0)
                mask = inside[None, :] & (columns < width)[:, None]
                total += taken[None, :] * tl.load(down_pointers + k * stride_i, mask=mask, other=0.0).to(tl.float32)
            values = tl.sum(total, axis=1)
            if bias is not None:
                values += tl.load(bias + expert * hidden + columns, mask=columns < width, other=0.0).to(tl.float32)
            result += share * values
    tl.store(out + token * hidden + columns, result.to(out.dtype.element_ty), mask=columns < hidden)
