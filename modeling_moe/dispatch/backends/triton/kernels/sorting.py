# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Two kernels sort the assignments by expert, by counting. A third one maps assignments to rows, and rows to tiles.

The package's docstring defines shapes and arguments. There are B blocks of BLOCK assignments, and BINS > E bins.
"""

import triton
import triton.language as tl


@triton.jit
def load_experts(index, assignments, num_assignments, num_experts):
    """Returns the experts of assignments (N,): E for an empty assignment and for one beyond the end."""
    experts = tl.load(index + assignments, mask=assignments < num_assignments, other=0)
    empty = (assignments >= num_assignments) | (experts < 0) | (experts >= num_experts)
    return tl.where(empty, num_experts, experts.to(tl.int32))


@triton.jit(do_not_specialize=["num_assignments"])
def count_slots(index, counts, num_assignments, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Computes counts (B, BINS): the number of each expert's assignments in each block, with empty ones in bin E."""
    block = tl.program_id(0)
    experts = load_experts(index, block * BLOCK + tl.arange(0, BLOCK), num_assignments, num_experts)
    tl.store(counts + block * BINS + tl.arange(0, BINS), tl.histogram(experts, BINS))


@triton.jit(do_not_specialize=["num_assignments", "num_blocks"])
def place_slots(
    index, counts, order, offsets, num_assignments, num_experts, num_blocks,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Computes order (A,) and offsets (E + 1,) from index (A,) and counts (B, BINS). The sort is stable."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.full((BINS,), 0, tl.int32)
    before = tl.full((BINS,), 0, tl.int32)
    for first in range(0, num_blocks, ROWS):
        blocks = first + tl.arange(0, ROWS)
        mask = (blocks < num_blocks)[:, None]
        count = tl.load(counts + blocks[:, None] * BINS + bins[None, :], mask=mask, other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((blocks < block)[:, None], count, 0), axis=0)
    begins = tl.cumsum(total, axis=0) - total
    # only the first block's program stores; a branch on the program's number was miscompiled (triton issue 11153)
    tl.store(offsets + bins, begins, mask=block * BINS + bins <= num_experts)
    places = begins + before
    steps = tl.arange(0, STEP)
    for first in range(0, BLOCK, STEP):
        assignments = block * BLOCK + first + steps
        experts = load_experts(index, assignments, num_assignments, num_experts)
        same = experts[:, None] == experts[None, :]
        rank = tl.sum((same & (steps[None, :] < steps[:, None])).to(tl.int32), axis=1)
        rows = tl.gather(places, experts, 0) + rank
        # assignments beyond the end come after all empty ones, and so are not stored
        tl.store(order + rows, assignments, mask=rows < num_assignments)
        places += tl.histogram(experts, BINS)


@triton.jit(do_not_specialize=["num_assignments", "num_tiles"])
def map_rows(
    order, offsets, inverse, tiles, num_assignments, num_tiles, num_experts,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Computes inverse (A,), the row of each assignment, and tiles from order (A,) and offsets (E + 1,)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    assignments = tl.load(order + rows, mask=rows < num_assignments, other=0)
    tl.store(inverse + assignments, rows, mask=rows < num_assignments)

    experts = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + experts, mask=experts < num_experts, other=0)
    ends = tl.load(offsets + experts + 1, mask=experts < num_experts, other=0)
    counts = (ends - begins + BLOCK_M - 1) // BLOCK_M
    used = tl.sum(counts, axis=0)
    last = tl.cumsum(counts, axis=0)
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # a tile's expert is the number of experts whose tiles all come before
    expert = tl.sum((last[None, :] <= number[:, None]).to(tl.int32), axis=1)
    known = tl.minimum(expert, EXPERTS - 1)
    begin = tl.gather(begins, known, 0) + (number - tl.gather(last - counts, known, 0)) * BLOCK_M
    tl.store(tiles + number, tl.where(number < used, expert, -1), mask=number < num_tiles)
    tl.store(tiles + num_tiles + number, tl.where(number < used, begin, 0), mask=number < num_tiles)
    tl.store(tiles + 2 * num_tiles + 0 * number, used + 0 * number, mask=number == 0)
