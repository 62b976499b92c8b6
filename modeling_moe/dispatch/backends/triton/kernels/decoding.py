# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These kernels compute a few tokens by matrix-vector products, which read only chosen experts and sort nothing.

The package's docstring defines shapes and arguments. index (T, K) holds expert ids; an id outside [0, E) marks an empty
assignment.
"""

import triton
import triton.language as tl

from .pieces import activate, load_tile


@triton.jit
def decode_up(
    x, index, up, stride_e, stride_c, stride_h, bias, a, num_experts, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes a (A, I) = activation(up_e x[token] + bias_e) of one assignment, not of an empty one."""
    WIDTH: tl.constexpr = BLOCK_N * 2 if LAYOUT == "pairs" else BLOCK_N
    limit_n = inner * 2 if LAYOUT == "pairs" else inner
    num_columns = inner if LAYOUT == "plain" else inner * 2
    assignment = tl.program_id(0)
    expert = tl.load(index + assignment).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, BLOCK_K)
    up_pointers = up + expert * stride_e + columns[:, None] * stride_c + depth[None, :] * stride_h
    x += assignment // TOP_K * hidden
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
    acted, _, _ = activate(g, u, alpha, limit, ACTIVATION, LAYOUT)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(a + assignment * inner + columns, acted, mask=columns < inner)


@triton.jit
def decode_down(
    a, index, weight, down, stride_e, stride_h, stride_i, bias, out, num_experts, hidden, inner,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes out (T, H) of one token: the sum over its assignments of weight * (down_e a + bias_e)."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    result = tl.full((BLOCK_N,), 0.0, tl.float32)
    for first in range(0, TOP_K, UNROLL):
        # unrolled, so that the ids of all these experts are loaded before the first matrix
        for step in tl.static_range(UNROLL):
            choice = first + step
            assignment = token * TOP_K + choice
            expert = tl.load(index + assignment, mask=choice < TOP_K, other=0).to(tl.int64)
            # masks instead of a branch: for an empty assignment no column is read
            served = (choice < TOP_K) & (expert >= 0) & (expert < num_experts)
            width = tl.where(served, hidden, 0)
            length = tl.where(served, inner, 0)
            share = tl.load(weight + assignment, mask=served, other=0.0)
            down_pointers = down + expert * stride_e + columns[:, None] * stride_h + depth[None, :] * stride_i
            total = tl.full((BLOCK_N, BLOCK_K), 0.0, tl.float32)
            for k in range(0, inner, BLOCK_K):
                inside = k + depth < length
                taken = tl.load(a + assignment * inner + k + depth, mask=inside, other=0.0)
                mask = inside[None, :] & (columns < width)[:, None]
                total += taken[None, :] * tl.load(down_pointers + k * stride_i, mask=mask, other=0.0).to(tl.float32)
            values = tl.sum(total, axis=1)
            if bias is not None:
                values += tl.load(bias + expert * hidden + columns, mask=columns < width, other=0.0).to(tl.float32)
            result += share * values
    tl.store(out + token * hidden + columns, result.to(out.dtype.element_ty), mask=columns < hidden)
