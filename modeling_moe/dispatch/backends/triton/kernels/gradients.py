# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These kernels compute the gradients of the activation, of the matrices and of the biases.

The package's docstring defines shapes and arguments.
"""

import triton
import triton.language as tl

from .pieces import activate, add_update, find_rows, halve, load_columns, load_tile, store_columns, swizzle


@triton.jit
def finish_gate_backward(
    total, column, rows, exist, share, h, grad_h, scaled, inner, alpha, limit,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes `gate_backward`'s outputs for a tile of grad down_e from `column` on; returns its part of grad_weight."""
    num_columns = inner if LAYOUT == "plain" else inner * 2
    columns = column + tl.arange(0, BLOCK_N)
    wide = column * 2 + tl.arange(0, BLOCK_N * 2)
    places = rows[:, None] * num_columns + columns[None, :]
    if LAYOUT == "pairs":
        pairs = load_columns(h + rows[:, None] * num_columns + wide[None, :], wide, num_columns, EVEN)
        g, u = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
    else:
        g = load_columns(h + places, columns, inner, EVEN)
        u = g
        if LAYOUT == "halves":
            u = load_columns(h + inner + places, columns, inner, EVEN)
    acted, slope_g, slope_u = activate(g.to(tl.float32), u.to(tl.float32), alpha, limit, ACTIVATION, LAYOUT)
    # columns beyond I have a total of 0
    partial = tl.sum(total * acted, axis=1)
    if scaled is not None:
        values = share[:, None] * acted
        store_columns(scaled + rows[:, None] * inner + columns[None, :], values, exist, columns, inner)
    if grad_h is not None:
        total *= share[:, None]
        if LAYOUT == "pairs":
            pairs = tl.join((total * slope_g).to(h.dtype.element_ty), (total * slope_u).to(h.dtype.element_ty))
            pairs = tl.reshape(pairs, (BLOCK_M, BLOCK_N * 2))
            store_columns(grad_h + rows[:, None] * num_columns + wide[None, :], pairs, exist, wide, num_columns)
        else:
            store_columns(grad_h + places, total * slope_g, exist, columns, inner)
            if LAYOUT == "halves":
                store_columns(grad_h + inner + places, total * slope_u, exist, columns, inner)
    return partial


@triton.jit
def finish_in_halves(
    total, column, rows, exist, share, h, grad_h, scaled, inner, alpha, limit,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Calls `finish_gate_backward` for the left and the right half of a tile; returns their part of grad_weight."""
    left, right = halve(total, BLOCK_M, BLOCK_N // 2)
    partial = finish_gate_backward(
        left, column, rows, exist, share, h, grad_h, scaled, inner, alpha, limit,
        ACTIVATION, LAYOUT, EVEN, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    partial += finish_gate_backward(
        right, column + BLOCK_N // 2, rows, exist, share, h, grad_h, scaled, inner, alpha, limit,
        ACTIVATION, LAYOUT, EVEN, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    return partial


@triton.jit(do_not_specialize=["num_tiles", "num_assignments"])
def gate_backward(
    grad, order, offsets, tiles, num_tiles, down, stride_e, stride_h, stride_i,
    narrow, factor, factor_e, factor_n, factor_r, rank, kept, h, weight, grad_h, scaled, grad_weight,
    num_assignments, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN: tl.constexpr, EVEN_N: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes the gradients behind the second matrices from grad_a = grad[token] down_e + narrow factor_e (I, R)^T.

    An output that is None is not computed.
    grad_h (A, C): the gradient of h, from grad_a times the combine weight.
    scaled (A, I): the activations times the combine weight.
    grad_weight (I tiles, A): parts of each row's <a, grad_a>, the gradient of its combine weight.
    kept (A, I), by assignment: bytes, 0 where dropout hides an element of the update, or None.
    """
    tile, n = swizzle(tl.program_id(0), num_tiles, (inner + BLOCK_N - 1) // BLOCK_N)
    expert, rows, exist = find_rows(tiles, num_tiles, tile, offsets, BLOCK_M)
    if expert < 0:
        return
    assignments = tl.load(order + rows)
    tokens = (assignments // TOP_K).to(tl.int64)
    column = n * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    grad_pointers = grad + tokens[:, None] * hidden + depth[None, :]
    down_pointers = down + expert * stride_e + depth[:, None] * stride_h + columns[None, :] * stride_i
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k in range(0, hidden, BLOCK_K):
        taken = load_columns(grad_pointers + k, k + depth, hidden, EVEN_K)
        weights = load_tile(down_pointers + k * stride_h, k + depth, columns, hidden, inner, EVEN)
        total = tl.dot(taken, weights, total, input_precision=PRECISION)
    if narrow is not None:
        total = add_update(
            total, narrow, rows, factor + expert * factor_e, factor_n, factor_r, columns, inner, rank,
            kept, assignments.to(tl.int64), STEPS, BLOCK_R, EVEN_R, PRECISION,
        )  # fmt: skip

    share = tl.load(weight + assignments)
    # in halves or quarters, or the registers do not suffice
    if BLOCK_N >= 128:
        left, right = halve(total, BLOCK_M, BLOCK_N // 2)
        partial = finish_in_halves(
            left, column, rows, exist, share, h, grad_h, scaled, inner, alpha, limit,
            ACTIVATION, LAYOUT, EVEN_N, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        partial += finish_in_halves(
            right, column + BLOCK_N // 2, rows, exist, share, h, grad_h, scaled, inner, alpha, limit,
            ACTIVATION, LAYOUT, EVEN_N, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        partial = finish_in_halves(
            total, column, rows, exist, share, h, grad_h, scaled, inner, alpha, limit,
            ACTIVATION, LAYOUT, EVEN_N, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if grad_weight is not None:
        tl.store(grad_weight + n.to(tl.int64) * num_assignments + rows, partial, mask=exist)


@triton.jit(do_not_specialize=["num_tiles", "num_assignments"])
def dot_bias(
    grad, order, offsets, tiles, num_tiles, bias, out, part, num_assignments, hidden,
    TOP_K: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes out[part] (A,) = <grad[token], bias_e>, the bias's part of the gradient of the combine weights."""
    expert, rows, exist = find_rows(tiles, num_tiles, tl.program_id(0), offsets, BLOCK_M)
    if expert < 0:
        return
    tokens = (tl.load(order + rows) // TOP_K).to(tl.int64)
    result = tl.full((BLOCK_M,), 0.0, tl.float32)
    for k in range(0, hidden, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        values = load_columns(grad + tokens[:, None] * hidden + columns[None, :], columns, hidden, EVEN_K)
        biases = tl.load(bias + expert * hidden + columns, mask=columns < hidden, other=0.0)
        result += tl.sum(values.to(tl.float32) * biases.to(tl.float32)[None, :], axis=1)
    tl.store(out + tl.cast(part, tl.int64) * num_assignments + rows, result, mask=exist)


@triton.jit
def weight_gradient(
    left, right, order, offsets, out, stride_e, stride_m, stride_n, num_m, num_n,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes out_e (M, N) = left (., M)^T right (., N), summed over expert e's rows; 0 for an idle expert.

    GATHER names the side that is (T, .) and gathered by token: "left", "right" or "neither". Other sides are (A, .).
    """
    tiles_m = (num_m + BLOCK_M - 1) // BLOCK_M
    tiles_n = (num_n + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = swizzle(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + expert + 1)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(tl.load(offsets + expert), end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        exist = rows < end
        left_rows = rows.to(tl.int64)
        right_rows = rows.to(tl.int64)
        if GATHER != "neither":
            tokens = (tl.load(order + rows, mask=exist, other=0) // TOP_K).to(tl.int64)
            if GATHER == "left":
                left_rows = tokens
            else:
                right_rows = tokens
        # both are masked: rows of other experts may hold NaN
        left_mask = exist[None, :] & (m < num_m)[:, None]
        right_mask = exist[:, None] & (n < num_n)[None, :]
        left_tile = tl.load(left + left_rows[None, :] * num_m + m[:, None], mask=left_mask, other=0.0)
        right_tile = tl.load(right + right_rows[:, None] * num_n + n[None, :], mask=right_mask, other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
    pointers = out + expert.to(tl.int64) * stride_e + m[:, None] * stride_m + n[None, :] * stride_n
    store_columns(pointers, total, m < num_m, n, num_n)


@triton.jit
def bias_gradient(
    values, order, offsets, weight, out, n, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Computes out (E, N): each expert's sum of values (A, N), or of weight (T, K) * values[token] (T, N)."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + expert + 1)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(tl.load(offsets + expert), end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        exist = rows < end
        mask = exist[:, None] & (columns < n)[None, :]
        if weight is not None:
            assignments = tl.load(order + rows, mask=exist, other=0)
            tokens = (assignments // TOP_K).to(tl.int64)
            taken = tl.load(values + tokens[:, None] * n + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            total += taken * tl.load(weight + assignments, mask=exist, other=0.0)[:, None]
        else:
            places = rows.to(tl.int64)[:, None] * n + columns[None, :]
            total += tl.load(values + places, mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + expert.to(tl.int64) * n + columns, result, mask=columns < n)
