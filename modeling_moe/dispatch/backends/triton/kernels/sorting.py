# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The order of the slots by expert, by counting: two kernels sort, a third one says where slots and tiles are.

The names of shapes and arguments stand in this package's docstring. B blocks of BLOCK slots; BINS > E.
"""

import triton
import triton.language as tl


@triton.jit
def load_experts(index, slots, num_slots, num_experts):
    """The experts of slots (N,), E for an empty slot and for one that there is not."""
    experts = tl.load(index + slots, mask=slots < num_slots, other=0)
    empty = (slots >= num_slots) | (experts < 0) | (experts >= num_experts)
    return tl.where(empty, num_experts, experts.to(tl.int32))


@triton.jit(do_not_specialize=["num_slots"])
def count_slots(index, counts, num_slots, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """counts (B, BINS) = how many slots of each block each expert has, with the empty slots in bin E."""
    block = tl.program_id(0)
    experts = load_experts(index, block * BLOCK + tl.arange(0, BLOCK), num_slots, num_experts)
    tl.store(counts + block * BINS + tl.arange(0, BINS), tl.histogram(experts, BINS))


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def place_slots(
    index, counts, order, offsets, num_slots, num_experts, num_blocks,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """order (S,) and offsets (E + 1,) from index (S,) and counts (B, BINS); equal experts stay in the order of slots."""
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
    # the first block's program alone, told by a mask: a branch on the program's number was miscompiled (triton 11153)
    tl.store(offsets + bins, begins, mask=block * BINS + bins <= num_experts)
    places = begins + before
    steps = tl.arange(0, STEP)
    for first in range(0, BLOCK, STEP):
        slots = block * BLOCK + first + steps
        experts = load_experts(index, slots, num_slots, num_experts)
        same = experts[:, None] == experts[None, :]
        rank = tl.sum((same & (steps[None, :] < steps[:, None])).to(tl.int32), axis=1)
        rows = tl.gather(places, experts, 0) + rank
        # slots that there are not come after all empty ones, so beyond the end
        tl.store(order + rows, slots, mask=rows < num_slots)
        places += tl.histogram(experts, BINS)


@triton.jit(do_not_specialize=["num_slots", "num_tiles"])
def map_rows(
    order, offsets, inverse, tiles, num_slots, num_tiles, num_experts,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """inverse (S,) and tiles (2 num_tiles + 1,) from order (S,) and offsets (E + 1,)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(order + rows, mask=rows < num_slots, other=0)
    tl.store(inverse + slots, rows, mask=rows < num_slots)

    experts = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + experts, mask=experts < num_experts, other=0)
    ends = tl.load(offsets + experts + 1, mask=experts < num_experts, other=0)
    counts = (ends - begins + BLOCK_M - 1) // BLOCK_M
    used = tl.sum(counts, axis=0)
    last = tl.cumsum(counts, axis=0)
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # as many experts have all their tiles before this one
    expert = tl.sum((last[None, :] <= number[:, None]).to(tl.int32), axis=1)
    known = tl.minimum(expert, EXPERTS - 1)
    begin = tl.gather(begins, known, 0) + (number - tl.gather(last - counts, known, 0)) * BLOCK_M
    tl.store(tiles + number, tl.where(number < used, expert, -1), mask=number < num_tiles)
    tl.store(tiles + num_tiles + number, tl.where(number < used, begin, 0), mask=number < num_tiles)
    tl.store(tiles + 2 * num_tiles + 0 * number, used + 0 * number, mask=number == 0)
