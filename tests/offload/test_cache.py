"""The expert cache keeps what a running pass needs, whatever other threads load ahead, and survives read errors."""

import linecache
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from modeling_moe.offload.cache import ExpertCache
from modeling_moe.offload.policies import POLICIES
from modeling_moe.offload.simulation import simulate
from modeling_moe.offload.slots import ALIGNMENT, ExpertSlots
from modeling_moe.offload.statistics import LayerStatistics


EXPERTS = 8


class Store:
    """Expert e is a matrix and a bias full of e; reads can fail and can be held up."""

    num_experts = EXPERTS
    parts = {"matrix": ((3, 5), torch.float32), "bias": ((3,), torch.float32)}

    def __init__(self):
        self.broken: set[int] = set()
        self.held: dict[int, threading.Event] = {}
        self.started: dict[int, threading.Event] = {}
        self.reads: list[int] = []

    def hold(self, expert: int) -> None:
        """Makes the next reads of an expert wait."""
        self.held[expert], self.started[expert] = threading.Event(), threading.Event()

    def read(self, expert, into):
        self.reads.append(expert)
        if expert in self.held:
            self.started[expert].set()
            assert self.held[expert].wait(10)
        if expert in self.broken:
            raise OSError(f"expert {expert} cannot be read")
        for tensor in into.values():
            tensor.fill_(expert)


def make(slots: int = 3, policy: str = "lru") -> ExpertCache:
    memory = ExpertSlots(Store.parts, slots, EXPERTS, torch.device("cpu"))
    return ExpertCache(Store(), POLICIES[policy](slots, EXPERTS), memory, LayerStatistics())


def run(cache: ExpertCache, needed: list[int]) -> list[tuple[int, int]]:
    """Runs a pass and returns its rounds; in each round the experts that it needs lie where the table says."""
    with cache.running(needed) as rounds:
        found = []
        for first, last in rounds:
            found.append((first, last))
            for expert in (each for each in needed if first <= each <= last):
                assert_resident(cache, expert)
    return found


def assert_resident(cache: ExpertCache, expert: int) -> None:
    slot = int(cache.slots.table[expert])
    assert slot >= 0
    assert cache.slots.experts[slot] == expert
    for tensor in cache.slots.memory(slot).values():
        assert (tensor == expert).all()


def test_matrices_are_aligned_and_biases_lie_close():
    slots = ExpertSlots(Store.parts, 3, EXPERTS, torch.device("cpu"))
    assert all(matrix.data_ptr() % ALIGNMENT == 0 for matrix in slots.tensors["matrix"])
    assert slots.tensors["matrix"].shape == (3, 3, 5)
    assert slots.tensors["bias"].is_contiguous()


@pytest.mark.parametrize("policy", POLICIES)
def test_rounds_ascend_and_cover_what_the_pass_needs(policy):
    cache, generator = make(3, policy), torch.Generator().manual_seed(0)
    assert run(cache, [0, 2, 5]) == [(0, 5)]
    assert run(cache, [0, 1, 2, 4]) == [(0, 0), (1, 1), (2, 2), (4, 4)]
    for _ in range(50):
        number = int(torch.randint(1, EXPERTS + 1, (1,), generator=generator))
        needed = sorted(torch.randperm(EXPERTS, generator=generator)[:number].tolist())
        assert len(run(cache, needed)) == (1 if number <= 3 else number)
    statistics = cache.statistics
    assert statistics.misses == len(cache.store.reads)
    assert statistics.bytes_read == statistics.misses * 4 * (3 * 5 + 3)


@pytest.mark.parametrize(("slots", "rounds"), [(1, 8), (4, 4), (5, 4), (7, 3), (8, 1)])
def test_a_pass_that_exceeds_the_slots_runs_in_rounds_of_half_of_them(slots, rounds):
    cache = make(slots)
    assert len(run(cache, list(range(EXPERTS)))) == rounds == cache.number_of_rounds(list(range(EXPERTS)))


def test_passes_that_exceed_the_slots_hit_experts_of_the_pass_before():
    """Rounds that fill all slots would leave no slot for anything that stays."""
    cache = make(4, "least_stale")
    for _ in range(20):
        run(cache, list(range(EXPERTS)))
    counts = simulate([range(EXPERTS)] * 20, "least_stale", 4, EXPERTS)
    assert (cache.statistics.hits, cache.statistics.misses) == counts
    assert counts.hit_rate > 0.2
    assert simulate([range(EXPERTS)] * 20, "least_stale", 4, EXPERTS, round_size=4).hits == 0


class Interrupt:
    """Raises KeyboardInterrupt, as Ctrl+C does, before the `number`-th line of this package that runs inside the block.

    Python never interrupts on entry to these statements.
    """

    SPARED = ("with ", "try:", "finally:", "except ")

    def __init__(self, number: int):
        self.left = number

    def trace(self, frame, event, arg):
        name = frame.f_code.co_filename
        if event == "line" and "modeling_moe" in name and not name.endswith(Path(__file__).name):
            if linecache.getline(name, frame.f_lineno).strip().startswith(self.SPARED):
                return self.trace
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


def test_a_pass_may_be_interrupted_anywhere_and_the_next_ones_serve():
    """An interrupt between two lines once left a slot taken for ever, and a later pass waited for it without end."""
    number, interrupted = 0, True
    while interrupted:
        number, interrupted = number + 1, False
        cache = make(3)
        run(cache, [0, 1, 2])
        try:
            with Interrupt(number):
                run(cache, [2, 3, 5, 6])
        except KeyboardInterrupt:
            interrupted = True
        after = threading.Thread(
            target=lambda cache=cache: [run(cache, needed) for needed in ([0, 1, 4], [2, 3, 5, 6], [0, 1, 2])],
            daemon=True,
        )
        after.start()
        after.join(10)
        assert not after.is_alive(), f"a pass hangs after an interrupt at line number {number}"
        assert sorted(cache.slots.experts) == [0, 1, 2]
        for expert in (0, 1, 2):
            assert_resident(cache, expert)
    assert number > 100


def test_an_interrupt_leaves_alone_what_a_prefetch_is_filling():
    cache = make(3)
    run(cache, [0, 1])
    cache.store.hold(5)
    prefetch = threading.Thread(target=cache.prefetch, args=([5],))
    prefetch.start()
    assert cache.store.started[5].wait(10)
    with suppress(KeyboardInterrupt), cache.running([0]) as rounds:
        next(rounds)
        raise KeyboardInterrupt
    assert run(cache, [0, 1]) == [(0, 1)]
    assert cache.store.reads == [0, 1, 5, 0, 1]
    cache.store.held[5].set()
    prefetch.join(10)
    for expert in (0, 1, 5):
        assert_resident(cache, expert)


def test_an_expert_is_read_once_while_it_stays():
    cache = make(3)
    for _ in range(3):
        run(cache, [1, 4, 6])
    assert cache.store.reads == [1, 4, 6]
    assert (cache.statistics.hits, cache.statistics.misses) == (6, 3)


def test_ids_of_empty_assignments_are_left_out():
    cache = make()
    index = torch.tensor([[3, EXPERTS, 1], [-1, 3, EXPERTS + 5]])
    assert cache.needed(index) == [1, 3]
    assert cache.needed(index.repeat(100, 1)) == [1, 3]
    assert index[1].tolist() == [-1, 3, EXPERTS + 5]


def test_a_prefetch_serves_the_next_pass():
    cache = make(3)
    cache.prefetch([2, 5])
    run(cache, [2, 3, 5])
    statistics = cache.statistics
    assert (statistics.hits, statistics.misses) == (2, 1)
    assert (statistics.prefetched, statistics.prefetched_used) == (2, 2)
    assert cache.store.reads == [2, 5, 3]


def test_a_prefetch_evicts_nothing_that_the_running_pass_needs():
    cache = make(3)
    with cache.running([0, 1, 2]) as rounds:
        next(rounds)
        cache.prefetch([4, 5])
        for expert in (0, 1, 2):
            assert_resident(cache, expert)
    assert cache.store.reads == [0, 1, 2]
    with cache.running([0]) as rounds:
        next(rounds)
        cache.prefetch([4, 5, 6])
        assert_resident(cache, 0)
    assert cache.store.reads == [0, 1, 2, 4, 5]


def test_a_pass_waits_for_the_copy_of_a_prefetch_and_reads_nothing_twice():
    cache = make(3)
    cache.store.hold(4)
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(cache.prefetch, [4])
        assert cache.store.started[4].wait(10)
        passed = pool.submit(run, cache, [4, 5])
        cache.store.held[4].set()
        assert passed.result(10) == [(4, 5)]
        ahead.result(10)
    assert sorted(cache.store.reads) == [4, 5]
    assert (cache.statistics.hits, cache.statistics.misses) == (1, 1)
    assert cache.statistics.stall_seconds > 0


def test_a_pass_that_needs_the_slot_of_a_running_prefetch_waits_for_it():
    cache = make(1)
    cache.store.hold(4)
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(cache.prefetch, [4])
        assert cache.store.started[4].wait(10)
        passed = pool.submit(run, cache, [5])
        cache.store.held[4].set()
        assert passed.result(10) == [(5, 5)]
        ahead.result(10)


def test_an_error_of_a_prefetch_is_raised_where_the_expert_is_needed():
    cache = make(3)
    cache.store.broken = {2}
    cache.prefetch([2])
    run(cache, [0, 1])
    with pytest.raises(OSError, match="expert 2 cannot be read"):
        run(cache, [1, 2])
    assert cache.slots.table[2] == -1
    cache.store.broken = set()
    assert run(cache, [1, 2]) == [(1, 2)]


@pytest.mark.parametrize("policy", POLICIES)
def test_passes_and_prefetches_of_several_threads(policy):
    cache = make(3, policy)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            some = torch.randperm(EXPERTS, generator=generator)[: 1 + seed % 5].tolist()
            if seed % 2:
                cache.prefetch(some)
            else:
                run(cache, sorted(some))

    with ThreadPoolExecutor(6) as pool:
        for result in [pool.submit(work, seed) for seed in range(6)]:
            result.result(60)
    assert cache.statistics.bytes_read == len(cache.store.reads) * 4 * (3 * 5 + 3)
    assert len(cache.store.reads) == cache.statistics.misses + cache.statistics.prefetched
