# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These kernels compute the matrix products of forward, with what is fused into them, and the sum over experts.

The package's docstring defines shapes and arguments.
"""

import triton
import triton.language as tl

from .pieces import activate, add_update, find_rows, load_columns, load_tile, store_columns, swizzle


@triton.jit
def finish_project_up(
    first, second, expert, rows, exist, n, bias, h, a, inner, alpha, limit,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the bias to the tile n of `project_up` and writes h and a, each unless it is None."""
    WIDTH: tl.constexpr = BLOCK_N * 2 if LAYOUT == "pairs" else BLOCK_N
    limit_n = inner * 2 if LAYOUT == "pairs" else inner
    num_columns = inner if LAYOUT == "plain" else inner * 2
    columns = n * WIDTH + tl.arange(0, WIDTH)
    if bias is not None:
        bias_pointers = bias + expert * num_columns + columns
        first += tl.load(bias_pointers, mask=columns < limit_n, other=0.0).to(tl.float32)[None, :]
        if LAYOUT == "halves":
            second += tl.load(bias_pointers + inner, mask=columns < limit_n, other=0.0).to(tl.float32)[None, :]
    if h is not None:
        h_pointers = h + rows[:, None] * num_columns + columns[None, :]
        store_columns(h_pointers, first, exist, columns, limit_n)
        if LAYOUT == "halves":
            store_columns(h_pointers + inner, second, exist, columns, limit_n)
    if a is not None:
        if LAYOUT == "pairs":
            first, second = tl.split(tl.reshape(first, (BLOCK_M, BLOCK_N, 2)))
        acted, _, _ = activate(first, second, alpha, limit, ACTIVATION, LAYOUT)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        store_columns(a + rows[:, None] * inner + columns[None, :], acted, exist, columns, inner)


@triton.jit(do_not_specialize=["num_tiles"])
def project_up(
    x, order, offsets, tiles, num_tiles, up, stride_e, stride_c, stride_h, bias,
    narrow, factor, factor_e, factor_n, factor_r, rank, h, a, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes h (A, C) = x[token] up_e^T + narrow factor_e (C, R)^T + bias_e and a (A, I) = activation(h).

    h and a are each written unless None.
    """
    # pairs are one tile of twice the width, halves are two tiles: both read contiguous memory
    WIDTH: tl.constexpr = BLOCK_N * 2 if LAYOUT == "pairs" else BLOCK_N
    limit_n = inner * 2 if LAYOUT == "pairs" else inner
    tile, n = swizzle(tl.program_id(0), num_tiles, (inner + BLOCK_N - 1) // BLOCK_N)
    expert, rows, exist = find_rows(tiles, num_tiles, tile, offsets, BLOCK_M)
    if expert < 0:
        return
    tokens = (tl.load(order + rows) // TOP_K).to(tl.int64)
    columns = n * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, BLOCK_K)
    x_pointers = x + tokens[:, None] * hidden + depth[None, :]
    up_pointers = up + expert * stride_e + columns[None, :] * stride_c + depth[:, None] * stride_h
    first = tl.full((BLOCK_M, WIDTH), 0.0, tl.float32)
    second = tl.full((BLOCK_M, WIDTH), 0.0, tl.float32)
    for k in range(0, hidden, BLOCK_K):
        taken = load_columns(x_pointers + k, k + depth, hidden, EVEN_K)
        pointers = up_pointers + k * stride_h
        weights = load_tile(pointers, k + depth, columns, hidden, limit_n, EVEN)
        first = tl.dot(taken, weights, first, input_precision=PRECISION)
        if LAYOUT == "halves":
            weights = load_tile(pointers + inner * stride_c, k + depth, columns, hidden, limit_n, EVEN)
            second = tl.dot(taken, weights, second, input_precision=PRECISION)
    if narrow is not None:
        factor += expert * factor_e
        first = add_update(
            first, narrow, rows, factor, factor_n, factor_r, columns, limit_n, rank, None, rows,
            STEPS, BLOCK_R, EVEN_R, PRECISION,
        )  # fmt: skip
        if LAYOUT == "halves":
            second = add_update(
                second, narrow, rows, factor + inner * factor_n, factor_n, factor_r, columns, limit_n, rank, None, rows,
                STEPS, BLOCK_R, EVEN_R, PRECISION,
            )  # fmt: skip
    finish_project_up(
        first, second, expert, rows, exist, n, bias, h, a, inner, alpha, limit, ACTIVATION, LAYOUT, BLOCK_M, BLOCK_N
    )


@triton.jit(do_not_specialize=["num_tiles"])
def multiply(
    left, order, offsets, tiles, num_tiles, weight, stride_e, stride_n, stride_k, bias,
    narrow, factor, factor_e, factor_n, factor_r, rank, kept, out, n, k,
    TOP_K: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes out (A, N) = left (A, K) weight_e (N, K)^T + narrow factor_e (N, R)^T + bias_e (N,).

    kept (T, N): bytes, 0 where dropout hides an element of the update, or None.
    """
    tile, tile_n = swizzle(tl.program_id(0), num_tiles, (n + BLOCK_N - 1) // BLOCK_N)
    expert, rows, exist = find_rows(tiles, num_tiles, tile, offsets, BLOCK_M)
    if expert < 0:
        return
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left_pointers = left + rows[:, None] * k + depth[None, :]
    weight_pointers = weight + expert * stride_e + columns[None, :] * stride_n + depth[:, None] * stride_k
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, k, BLOCK_K):
        taken = load_columns(left_pointers + step, step + depth, k, EVEN_K)
        weights = load_tile(weight_pointers + step * stride_k, step + depth, columns, k, n, EVEN)
        total = tl.dot(taken, weights, total, input_precision=PRECISION)
    if narrow is not None:
        tokens = rows
        if kept is not None:
            tokens = (tl.load(order + rows) // TOP_K).to(tl.int64)
        total = add_update(
            total, narrow, rows, factor + expert * factor_e, factor_n, factor_r, columns, n, rank, kept, tokens,
            STEPS, BLOCK_R, EVEN_R, PRECISION,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + expert * n + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    store_columns(out + rows[:, None] * n + columns[None, :], total, exist, columns, n)


@triton.jit(do_not_specialize=["num_tiles"])
def multiply_persistent(
    left, offsets, tiles, num_tiles, weight, bias, out, n, k,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes out (A, N) = left (A, K) weight_e (N, K)^T + bias_e (N,). Each program works on one tile after another.

    left and weight are tensor descriptors, which the bulk copy engine (TMA) reads by; weight is (E, K, N) if
    TRANSPOSED, else (E, N, K). A tile's rows lie one after another, so no row has to be looked up; those after the
    expert's last belong to the next one and are not written. One tile's store runs while the next is multiplied.
    """
    num_n = (n + BLOCK_N - 1) // BLOCK_N
    used = tl.load(tiles + 2 * num_tiles)
    for program in tl.range(tl.program_id(0), used * num_n, tl.num_programs(0), flatten=True):
        tile, tile_n = swizzle(program, used, num_n)
        expert = tl.load(tiles + tile)
        begin = tl.load(tiles + num_tiles + tile)
        end = tl.load(offsets + expert + 1)
        total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for step in range(0, k, BLOCK_K):
            taken = left.load([begin, step])
            if TRANSPOSED:
                weights = tl.reshape(weight.load([expert, step, tile_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                weights = tl.trans(tl.reshape(weight.load([expert, tile_n * BLOCK_N, step]), (BLOCK_N, BLOCK_K)))
            total = tl.dot(taken, weights, total, input_precision=PRECISION)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = begin + tl.arange(0, BLOCK_M)
        if bias is not None:
            pointers = bias + expert.to(tl.int64) * n + columns
            total += tl.load(pointers, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        store_columns(out + rows.to(tl.int64)[:, None] * n + columns[None, :], total, rows < end, columns, n)


@triton.jit
def combine(y, inverse, offsets, num_experts, weight, out, hidden, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Computes out (T, H): each token's rows of y (A, H), times `weight` (T, K) if given, added in the order of k.

    inverse (A,): the row of each assignment. Rows from offsets[E] on are unwritten and left out.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    served = tl.load(offsets + num_experts)
    result = tl.full((BLOCK_N,), 0.0, tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k).to(tl.int64)
        width = tl.where(row < served, hidden, 0)
        values = tl.load(y + row * hidden + columns, mask=columns < width, other=0.0).to(tl.float32)
        if weight is not None:
            values *= tl.load(weight + token * TOP_K + k, mask=row < served, other=0.0)
        result += values
    tl.store(out + token * hidden + columns, result.to(out.dtype.element_ty), mask=columns < hidden)
