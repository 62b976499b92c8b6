# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of the dispatch; triton_backend.py launches them.

# T tokens, K (TOP_K) experts per token, S = T*K slots; E experts; H HIDDEN, I INNER, C = I or 2I columns of h
# row: a place in `order` (S,), which sorts the slots by expert; x, grad, h, ... are contiguous, experts have strides
# LAYOUT: what the columns of h are: "plain" activations, "halves" [g | u] or "pairs" g0, u0, g1, u1, ...
# `tiles` (2, num_tiles) int32: of each tile of BLOCK_M rows, its expert (-1: no such tile) and its first row
"""

import triton
import triton.language as tl


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
def load_tile(pointers, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """What pointers (M, N) point to, 0 where rows (M,) >= ROWS or columns (N,) >= COLUMNS; EVEN: that is nowhere."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), other=0.0)
    return tile


@triton.jit
def load_columns(pointers, columns, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """`load_tile` where every row exists."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def swizzle(program, num_m, num_n):
    """The tile (m, n) of a program: m runs first, in groups, so that few tiles of either operand are in use at once."""
    GROUP: tl.constexpr = 8
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
def map_tiles(offsets, tiles, num_experts, num_tiles, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """`tiles` from `offsets` (E + 1,); program e < E writes expert e's tiles, program E marks the surplus."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + experts, mask=experts < num_experts, other=0)
    ends = tl.load(offsets + experts + 1, mask=experts < num_experts, other=0)
    counts = (ends - begins + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(experts < expert, counts, 0))
    count = tl.sum(tl.where(experts == expert, counts, 0))
    count = tl.where(expert < num_experts, count, num_tiles - first)
    begin = tl.load(offsets + expert)
    value = tl.where(expert < num_experts, expert, -1)
    for start in range(0, count, 128):
        place = start + tl.arange(0, 128)
        tl.store(tiles + first + place, value + 0 * place, mask=place < count)
        tl.store(tiles + num_tiles + first + place, begin + place * BLOCK_M, mask=place < count)


@triton.jit
def store_columns(pointers, values, rows_exist, columns, COLUMNS: tl.constexpr):
    """Writes values (M, N) where the row exists and columns (N,) < COLUMNS."""
    mask = rows_exist[:, None] & (columns < COLUMNS)[None, :]
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def project_up(
    x, order, offsets, tiles, num_tiles, up, stride_e, stride_c, stride_h, bias, h, a, alpha, limit,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h (S, C) = x[token] up_e^T + bias_e and a (S, I) = gate(h), each unless it is None."""
    # pairs come as one tile of twice the width, halves as two: both read whole stretches of memory
    WIDTH: tl.constexpr = BLOCK_N * 2 if LAYOUT == "pairs" else BLOCK_N
    LIMIT: tl.constexpr = INNER * 2 if LAYOUT == "pairs" else INNER
    C: tl.constexpr = INNER if LAYOUT == "plain" else INNER * 2
    EVEN_K: tl.constexpr = HIDDEN % BLOCK_K == 0
    EVEN: tl.constexpr = (HIDDEN % BLOCK_K == 0) and (LIMIT % WIDTH == 0)
    tile, n = swizzle(tl.program_id(0), num_tiles, (INNER + BLOCK_N - 1) // BLOCK_N)
    expert, rows, exist = find_rows(tiles, num_tiles, tile, offsets, BLOCK_M)
    if expert < 0:
        return
    tokens = (tl.load(order + rows) // TOP_K).to(tl.int64)
    columns = n * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, BLOCK_K)
    x_pointers = x + tokens[:, None] * HIDDEN + depth[None, :]
    up_pointers = up + expert * stride_e + columns[None, :] * stride_c + depth[:, None] * stride_h
    first = tl.full((BLOCK_M, WIDTH), 0.0, tl.float32)
    second = tl.full((BLOCK_M, WIDTH), 0.0, tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        taken = load_columns(x_pointers + k, k + depth, HIDDEN, EVEN_K)
        pointers = up_pointers + k * stride_h
        first = tl.dot(
            taken, load_tile(pointers, k + depth, columns, HIDDEN, LIMIT, EVEN), first, input_precision="ieee"
        )
        if LAYOUT == "halves":
            weights = load_tile(pointers + INNER * stride_c, k + depth, columns, HIDDEN, LIMIT, EVEN)
            second = tl.dot(taken, weights, second, input_precision="ieee")
    if bias is not None:
        bias_pointers = bias + expert * C + columns
        first += tl.load(bias_pointers, mask=columns < LIMIT, other=0.0).to(tl.float32)[None, :]
        if LAYOUT == "halves":
            second += tl.load(bias_pointers + INNER, mask=columns < LIMIT, other=0.0).to(tl.float32)[None, :]
    if h is not None:
        h_pointers = h + rows[:, None] * C + columns[None, :]
        store_columns(h_pointers, first, exist, columns, LIMIT)
        if LAYOUT == "halves":
            store_columns(h_pointers + INNER, second, exist, columns, LIMIT)
    if a is not None:
        if LAYOUT == "pairs":
            first, second = tl.split(tl.reshape(first, (BLOCK_M, BLOCK_N, 2)))
        acted, _, _ = gate(first, second, alpha, limit, ACTIVATION, LAYOUT)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        store_columns(a + rows[:, None] * INNER + columns[None, :], acted, exist, columns, INNER)


@triton.jit
def multiply(
    left, offsets, tiles, num_tiles, weight, stride_e, stride_n, stride_k, bias, out,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (S, N) = left (S, K) weight_e (N, K)^T + bias_e (N,)."""
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN: tl.constexpr = (K % BLOCK_K == 0) and (N % BLOCK_N == 0)
    tile, n = swizzle(tl.program_id(0), num_tiles, (N + BLOCK_N - 1) // BLOCK_N)
    expert, rows, exist = find_rows(tiles, num_tiles, tile, offsets, BLOCK_M)
    if expert < 0:
        return
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left_pointers = left + rows[:, None] * K + depth[None, :]
    weight_pointers = weight + expert * stride_e + columns[None, :] * stride_n + depth[:, None] * stride_k
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        taken = load_columns(left_pointers + k, k + depth, K, EVEN_K)
        weights = load_tile(weight_pointers + k * stride_k, k + depth, columns, K, N, EVEN)
        total = tl.dot(taken, weights, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    store_columns(out + rows[:, None] * N + columns[None, :], total, exist, columns, N)


@triton.jit
def combine(y, inverse, total, weight, out, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (T, H) = each token's rows of y (S, H), added in the order of its slots, times `weight` (T, K) or once.

    inverse (S,): a slot's row; `total` points to the number of rows that are served.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    served = tl.load(total)
    result = tl.full((BLOCK_N,), 0.0, tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k).to(tl.int64)
        width = tl.where(row < served, HIDDEN, 0)
        values = tl.load(y + row * HIDDEN + columns, mask=columns < width, other=0.0).to(tl.float32)
        if weight is not None:
            values *= tl.load(weight + token * TOP_K + k, mask=row < served, other=0.0)
        result += values
    tl.store(out + token * HIDDEN + columns, result.to(out.dtype.element_ty), mask=columns < HIDDEN)


@triton.jit
def finish_gate_backward(
    total, column, rows, exist, factor, h, grad_h, scaled, alpha, limit,
    INNER: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `gate_backward` does with a tile of grad down_e, columns from `column` on; its part of grad_weight."""
    C: tl.constexpr = INNER if LAYOUT == "plain" else INNER * 2
    EVEN: tl.constexpr = INNER % BLOCK_N == 0
    columns = column + tl.arange(0, BLOCK_N)
    wide = column * 2 + tl.arange(0, BLOCK_N * 2)
    places = rows[:, None] * C + columns[None, :]
    if LAYOUT == "pairs":
        pairs = load_columns(h + rows[:, None] * C + wide[None, :], wide, C, EVEN)
        g, u = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
    else:
        g = load_columns(h + places, columns, INNER, EVEN)
        u = g
        if LAYOUT == "halves":
            u = load_columns(h + INNER + places, columns, INNER, EVEN)
    acted, slope_g, slope_u = gate(g.to(tl.float32), u.to(tl.float32), alpha, limit, ACTIVATION, LAYOUT)
    # columns beyond INNER have a total of 0
    partial = tl.sum(total * acted, axis=1)
    if scaled is not None:
        values = factor[:, None] * acted
        store_columns(scaled + rows[:, None] * INNER + columns[None, :], values, exist, columns, INNER)
    if grad_h is not None:
        total *= factor[:, None]
        if LAYOUT == "pairs":
            pairs = tl.join((total * slope_g).to(h.dtype.element_ty), (total * slope_u).to(h.dtype.element_ty))
            pairs = tl.reshape(pairs, (BLOCK_M, BLOCK_N * 2))
            store_columns(grad_h + rows[:, None] * C + wide[None, :], pairs, exist, wide, C)
        else:
            store_columns(grad_h + places, total * slope_g, exist, columns, INNER)
            if LAYOUT == "halves":
                store_columns(grad_h + INNER + places, total * slope_u, exist, columns, INNER)
    return partial


@triton.jit
def gate_backward(
    grad, order, offsets, tiles, num_tiles, down, stride_e, stride_h, stride_i, h, weight, grad_h, scaled, grad_weight,
    num_slots, alpha, limit,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From grad[token] down_e (S, I) and h (S, C), those of these which are not None:

    grad_h (S, C), the gradient of h; scaled (S, I), weight * a; grad_weight (I tiles, S), sums to a . (grad down_e).
    """
    EVEN_K: tl.constexpr = HIDDEN % BLOCK_K == 0
    EVEN: tl.constexpr = (HIDDEN % BLOCK_K == 0) and (INNER % BLOCK_N == 0)
    tile, n = swizzle(tl.program_id(0), num_tiles, (INNER + BLOCK_N - 1) // BLOCK_N)
    expert, rows, exist = find_rows(tiles, num_tiles, tile, offsets, BLOCK_M)
    if expert < 0:
        return
    slots = tl.load(order + rows)
    tokens = (slots // TOP_K).to(tl.int64)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    grad_pointers = grad + tokens[:, None] * HIDDEN + depth[None, :]
    down_pointers = down + expert * stride_e + depth[:, None] * stride_h + columns[None, :] * stride_i
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        taken = load_columns(grad_pointers + k, k + depth, HIDDEN, EVEN_K)
        weights = load_tile(down_pointers + k * stride_h, k + depth, columns, HIDDEN, INNER, EVEN)
        total = tl.dot(taken, weights, total, input_precision="ieee")

    factor = tl.load(weight + slots)
    column = n * BLOCK_N
    # the rest in two halves, or the registers do not suffice
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    partial = finish_gate_backward(
        left, column, rows, exist, factor, h, grad_h, scaled, alpha, limit, INNER, ACTIVATION, LAYOUT, BLOCK_M, HALF
    )
    column += HALF
    partial += finish_gate_backward(
        right, column, rows, exist, factor, h, grad_h, scaled, alpha, limit, INNER, ACTIVATION, LAYOUT, BLOCK_M, HALF
    )
    if grad_weight is not None:
        tl.store(grad_weight + n.to(tl.int64) * num_slots + rows, partial, mask=exist)


@triton.jit
def dot_bias(
    grad, order, offsets, tiles, num_tiles, bias, out,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (S,) = grad[token] . bias_e (H,), what the bias adds to the gradient of the weights."""
    expert, rows, exist = find_rows(tiles, num_tiles, tl.program_id(0), offsets, BLOCK_M)
    if expert < 0:
        return
    tokens = (tl.load(order + rows) // TOP_K).to(tl.int64)
    result = tl.full((BLOCK_M,), 0.0, tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        values = load_columns(
            grad + tokens[:, None] * HIDDEN + columns[None, :], columns, HIDDEN, HIDDEN % BLOCK_K == 0
        )
        biases = tl.load(bias + expert * HIDDEN + columns, mask=columns < HIDDEN, other=0.0)
        result += tl.sum(values.to(tl.float32) * biases.to(tl.float32)[None, :], axis=1)
    tl.store(out + rows, result, mask=exist)


@triton.jit
def weight_gradient(
    left, right, order, offsets, out, stride_e, stride_m, stride_n,
    M: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out_e (M, N) = sum over expert e's rows of left (., M)^T right (., N), 0 if it has none.

    One of the two is (T, .) and gathered by token: left if GATHER_LEFT, else right; the other is (S, .).
    """
    num_m = (M + BLOCK_M - 1) // BLOCK_M
    num_n = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (num_m * num_n)
    tile_m, tile_n = swizzle(tl.program_id(0) % (num_m * num_n), num_m, num_n)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + expert + 1)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(tl.load(offsets + expert), end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        exist = rows < end
        tokens = (tl.load(order + rows, mask=exist, other=0) // TOP_K).to(tl.int64)
        if GATHER_LEFT:
            left_rows = tokens
            right_rows = rows.to(tl.int64)
        else:
            left_rows = rows.to(tl.int64)
            right_rows = tokens
        left_mask = exist[None, :] & (m < M)[:, None]
        right_mask = exist[:, None] & (n < N)[None, :]
        left_tile = tl.load(left + left_rows[None, :] * M + m[:, None], mask=left_mask, other=0.0)
        right_tile = tl.load(right + right_rows[:, None] * N + n[None, :], mask=right_mask, other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
    pointers = out + expert.to(tl.int64) * stride_e + m[:, None] * stride_m + n[None, :] * stride_n
    store_columns(pointers, total, m < M, n, N)


@triton.jit
def bias_gradient(
    values, order, offsets, weight, out,
    N: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (E, N) = each expert's sum of values (S, N), or of weight (T, K) * values[token] (T, N)."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + expert + 1)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(tl.load(offsets + expert), end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        exist = rows < end
        mask = exist[:, None] & (columns < N)[None, :]
        if weight is not None:
            slots = tl.load(order + rows, mask=exist, other=0)
            tokens = (slots // TOP_K).to(tl.int64)
            taken = tl.load(values + tokens[:, None] * N + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            total += taken * tl.load(weight + slots, mask=exist, other=0.0)[:, None]
        else:
            places = rows.to(tl.int64)[:, None] * N + columns[None, :]
            total += tl.load(values + places, mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + expert.to(tl.int64) * N + columns, result, mask=columns < N)


@triton.jit
def decode_up(
    x, index, up, stride_e, stride_c, stride_h, bias, a, num_experts, alpha, limit,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a (S, I) = gate(up_e x[token] + bias_e), one slot per program; an empty slot's row is left as it is."""
    WIDTH: tl.constexpr = BLOCK_N * 2 if LAYOUT == "pairs" else BLOCK_N
    LIMIT: tl.constexpr = INNER * 2 if LAYOUT == "pairs" else INNER
    C: tl.constexpr = INNER if LAYOUT == "plain" else INNER * 2
    EVEN: tl.constexpr = (HIDDEN % BLOCK_K == 0) and (LIMIT % WIDTH == 0)
    slot = tl.program_id(0)
    expert = tl.load(index + slot).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, BLOCK_K)
    up_pointers = up + expert * stride_e + columns[:, None] * stride_c + depth[None, :] * stride_h
    first = tl.full((WIDTH, BLOCK_K), 0.0, tl.float32)
    second = tl.full((WIDTH, BLOCK_K), 0.0, tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        taken = tl.load(x + slot // TOP_K * HIDDEN + k + depth, mask=k + depth < HIDDEN, other=0.0).to(tl.float32)[
            None, :
        ]
        pointers = up_pointers + k * stride_h
        first += taken * load_tile(pointers, columns, k + depth, LIMIT, HIDDEN, EVEN).to(tl.float32)
        if LAYOUT == "halves":
            second += taken * load_tile(pointers + INNER * stride_c, columns, k + depth, LIMIT, HIDDEN, EVEN).to(
                tl.float32
            )
    g = tl.sum(first, axis=1)
    u = tl.sum(second, axis=1)
    if bias is not None:
        g += tl.load(bias + expert * C + columns, mask=columns < LIMIT, other=0.0).to(tl.float32)
        if LAYOUT == "halves":
            u += tl.load(bias + expert * C + INNER + columns, mask=columns < LIMIT, other=0.0).to(tl.float32)
    if LAYOUT == "pairs":
        g, u = tl.split(tl.reshape(g, (BLOCK_N, 2)))
    acted, _, _ = gate(g, u, alpha, limit, ACTIVATION, LAYOUT)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(a + slot * INNER + columns, acted, mask=columns < INNER)


@triton.jit
def decode_down(
    a, index, weight, down, stride_e, stride_h, stride_i, bias, out, num_experts,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (T, H) = sum over a token's slots of weight * (down_e a + bias_e), one token per program."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    result = tl.full((BLOCK_N,), 0.0, tl.float32)
    for choice in range(TOP_K):
        slot = token * TOP_K + choice
        expert = tl.load(index + slot).to(tl.int64)
        # no branch: of an empty slot no column and no depth is read
        served = (expert >= 0) & (expert < num_experts)
        width = tl.where(served, HIDDEN, 0)
        length = tl.where(served, INNER, 0)
        factor = tl.load(weight + slot, mask=served, other=0.0)
        down_pointers = down + expert * stride_e + columns[:, None] * stride_h + depth[None, :] * stride_i
        total = tl.full((BLOCK_N, BLOCK_K), 0.0, tl.float32)
        for k in range(0, INNER, BLOCK_K):
            inside = k + depth < length
            taken = tl.load(a + slot * INNER + k + depth, mask=inside, other=0.0)
            mask = inside[None, :] & (columns < width)[:, None]
            total += taken[None, :] * tl.load(down_pointers + k * stride_i, mask=mask, other=0.0).to(tl.float32)
        values = tl.sum(total, axis=1)
        if bias is not None:
            values += tl.load(bias + expert * HIDDEN + columns, mask=columns < width, other=0.0).to(tl.float32)
        result += factor * values
    tl.store(out + token * HIDDEN + columns, result.to(out.dtype.element_ty), mask=columns < HIDDEN)
