# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What several kernels are made of: the gate, tiles of rows, loads and stores with masks."""

import triton
import triton.language as tl


# tiles of a group in `swizzle`
GROUP = tl.constexpr(8)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x), the shape of x."""
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
def gate(g, u, alpha, limit, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr):
    """g, u -> a and the slopes da/dg, da/du, all of one shape; the compiler drops the slopes a caller ignores."""
    if ACTIVATION == "clamped_swiglu":
        kept_g = tl.where(g > limit, limit, g)
        kept_u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        sigmoid = tl.sigmoid(alpha * kept_g)
        value = kept_g * sigmoid * (kept_u + 1)
        slope_g = tl.where(g > limit, 0.0, (kept_u + 1) * sigmoid * (1 + alpha * kept_g * (1 - sigmoid)))
        slope_u = tl.where(tl.abs(u) > limit, 0.0, kept_g * sigmoid)
    else:
        value, slope_g = activation(g, ACTIVATION)
        slope_u = value
        if LAYOUT == "halves":
            value = slope_u * u
            slope_g = slope_g * u
    return value, slope_g, slope_u


@triton.jit
def load_tile(pointers, rows, columns, num_rows, num_columns, EVEN: tl.constexpr):
    """What pointers (M, N) point to, 0 where rows (M,) >= num_rows or columns (N,) >= num_columns; EVEN: nowhere."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(rows[:, None] < num_rows) & (columns[None, :] < num_columns), other=0.0)
    return tile


@triton.jit
def load_columns(pointers, columns, num_columns, EVEN: tl.constexpr):
    """What pointers (M, N) point to, 0 where columns (N,) >= num_columns; EVEN: nowhere."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(columns < num_columns)[None, :], other=0.0)


@triton.jit
def store_columns(pointers, values, rows_exist, columns, num_columns):
    """Writes values (M, N) where the row exists and columns (N,) < num_columns."""
    mask = rows_exist[:, None] & (columns < num_columns)[None, :]
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def swizzle(program, num_m, num_n):
    """The tile (m, n) of a program: m runs first, in groups, so that few tiles of either operand are in use at once."""
    first = program // (GROUP * num_n) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    place = program % (GROUP * num_n)
    return first + place % size, place // size


@triton.jit
def find_rows(tiles, num_tiles, tile, offsets, BLOCK_M: tl.constexpr):
    """A tile's expert, its rows (BLOCK_M,) int64 and which of them exist; the others repeat the expert's last row."""
    expert = tl.load(tiles + tile)
    rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, BLOCK_M)
    # a surplus tile has expert -1, and reads what it never uses
    end = tl.load(offsets + expert + 1)
    return expert.to(tl.int64), tl.maximum(tl.minimum(rows, end - 1), 0).to(tl.int64), rows < end


@triton.jit
def halve(tile, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of tile (BLOCK_M, 2 HALF)."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, HALF)), (0, 2, 1)))


@triton.jit
def add_update(
    total, narrow, rows, factor, stride_n, stride_r, columns, num_columns, rank, kept, kept_rows,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total (M, N) + narrow[rows] (M, R) factor[columns] (N, R)^T, where `kept` [kept_rows, columns] if it is given.

    `factor` points to the expert's matrix. After the loop over the depth, not in it: Triton miscompiles two products
    into one accumulator in a loop on sm_100 (triton-lang/triton issue 10821).
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
