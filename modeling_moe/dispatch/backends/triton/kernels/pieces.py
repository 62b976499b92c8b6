# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These functions are shared by the kernels: the activation, tiles of rows, loads and stores with masks."""

import triton
import triton.language as tl


@triton.jit
def pointwise(x, ACTIVATION: tl.constexpr):
    """Returns f(x) and f'(x) of the pointwise function ACTIVATION, in the shape of x."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid * (1 + x * (1 - sigmoid))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2z)
        sigmoid = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        value = x * sigmoid
        slope = sigmoid + x * sigmoid * (1 - sigmoid) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        rectified = tl.where(x < 0, 0.0, x)
        value = rectified * rectified
        slope = 2 * rectified
    return value, slope


@triton.jit
def activate(g, u, alpha, limit, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr):
    """Returns a, da/dg and da/du of the activation at g and u. The compiler drops slopes that a caller ignores."""
    if ACTIVATION == "clamped_swiglu" or ACTIVATION == "clamped_silu":
        kept_g = tl.where(g > limit, limit, g)
        factor = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        if ACTIVATION == "clamped_swiglu":
            factor = factor + 1
        sigmoid = tl.sigmoid(alpha * kept_g)
        value = kept_g * sigmoid * factor
        slope_g = tl.where(g > limit, 0.0, factor * sigmoid * (1 + alpha * kept_g * (1 - sigmoid)))
        slope_u = tl.where(tl.abs(u) > limit, 0.0, kept_g * sigmoid)
    else:
        value, slope_g = pointwise(g, ACTIVATION)
        slope_u = value
        if LAYOUT == "halves":
            value = slope_u * u
            slope_g = slope_g * u
    return value, slope_g, slope_u


@triton.jit
def load_tile(pointers, rows, columns, num_rows, num_columns, EVEN: tl.constexpr):
    """Loads pointers (M, N). Without EVEN it returns 0 where rows (M,) >= num_rows or columns (N,) >= num_columns."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(rows[:, None] < num_rows) & (columns[None, :] < num_columns), other=0.0)
    return tile


@triton.jit
def load_columns(pointers, columns, num_columns, EVEN: tl.constexpr):
    """Loads from pointers (M, N). Without EVEN it returns 0 where columns (N,) >= num_columns."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(columns < num_columns)[None, :], other=0.0)


@triton.jit
def store_columns(pointers, values, rows_exist, columns, num_columns):
    """Stores values (M, N) where the row exists and columns (N,) < num_columns."""
    mask = rows_exist[:, None] & (columns < num_columns)[None, :]
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def swizzle(program, num_m, num_n):
    """Returns the tile (m, n) of a program. m runs first, in groups, so that concurrent programs share operands."""
    # a group has 8 tiles along m
    first = program // (8 * num_n) * 8
    size = tl.minimum(num_m - first, 8)
    place = program % (8 * num_n)
    return first + place % size, place // size


@triton.jit
def find_rows(tiles, num_tiles, tile, offsets, BLOCK_M: tl.constexpr):
    """Returns a tile's expert, its rows (BLOCK_M,) int64, and which of them exist. The others repeat the last row."""
    expert = tl.load(tiles + tile)
    rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, BLOCK_M)
    # an unused tile has the expert -1, and does not use this
    end = tl.load(offsets + expert + 1)
    return expert.to(tl.int64), tl.maximum(tl.minimum(rows, end - 1), 0).to(tl.int64), rows < end


@triton.jit
def halve(tile, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """Splits a tile (BLOCK_M, 2 HALF) into its left and its right half."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, HALF)), (0, 2, 1)))


@triton.jit
def add_update(
    total, narrow, rows, factor, stride_n, stride_r, columns, num_columns, rank, kept, kept_rows,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns total (M, N) + narrow[rows] (M, R) factor[columns] (N, R)^T, added only where `kept` holds if given.

    `factor` points to the expert's matrix, `kept` is read at [kept_rows, columns]. It is called after the loop over the
    depth: Triton miscompiles two products into one accumulator in a loop on sm_100 (triton-lang/triton issue 10821).
    """
    ranks = tl.arange(0, BLOCK_R)
    update = total
    if kept is not None:
        update = tl.zeros_like(total)
    for step in tl.static_range(STEPS):
        place = step * BLOCK_R + ranks
        left = load_columns(narrow + rows[:, None] * rank + place[None, :], place, rank, EVEN_R)
        pointers = factor + columns[None, :] * stride_n + place[:, None] * stride_r
        inside = (place < rank)[:, None] & (columns < num_columns)[None, :]
        right = tl.load(pointers, mask=inside, other=0.0)
        update = tl.dot(left, right, update, input_precision=PRECISION)
    if kept is not None:
        mask = (columns < num_columns)[None, :]
        keeps = tl.load(kept + kept_rows[:, None] * num_columns + columns[None, :], mask=mask, other=0)
        update = total + tl.where(keeps != 0, update, 0.0)
    return update
