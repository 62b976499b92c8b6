"""This module tests the replay of traces and Belady's bound, against brute force and by hand."""

import functools
import itertools
import random

import pytest

from modeling_moe.offload.comparison import compare_policies
from modeling_moe.offload.policies import POLICIES, LeastRecentlyUsed
from modeling_moe.offload.recording import LayerTrace, Trace
from modeling_moe.offload.simulation import CacheCounts, belady, rounds_of, simulate, zipf_passes


def random_passes(seed: int, num_experts: int, passes: int) -> list[list[int]]:
    """Returns passes of 0 to `num_experts` experts."""
    draw = random.Random(seed)
    return [sorted(draw.sample(range(num_experts), draw.randint(0, min(num_experts, 4)))) for _ in range(passes)]


def fewest_misses(passes: list[list[int]], slots: int, round_size: int | None) -> int:
    """Returns the fewest misses over all ways to fill the slots, by trying every set of experts to keep."""
    rounds = [frozenset(part) for needed in passes for part in rounds_of(needed, slots, round_size)]

    @functools.cache
    def least(number: int, resident: frozenset[int]) -> int:
        if number == len(rounds):
            return 0
        needed = rounds[number]
        others, room = resident - needed, slots - len(needed)
        kept = itertools.combinations(others, min(room, len(others)))
        return len(needed - resident) + min(least(number + 1, needed | frozenset(some)) for some in kept)

    return least(0, frozenset())


# name -> hits of passes that were traced by hand with two slots
BY_HAND = {
    "lru": (2, 7),
    "lfu": (3, 6),
    "lfru": (3, 6),
    "least_stale": (2, 7),
    "belady": (3, 6),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_hand_computed_trace_of_single_experts(name):
    # two slots; LRU: 0 miss, 0 hit, 1 miss, 2 miss (out 0), 0 miss (out 1), 3 miss (out 2), 0 hit, 1 miss (out 3), 2 miss (out 0);
    # LFU and LFRU keep expert 0: a miss for 1, 2 (out 1), 3 (out 2), 1 (out 3), 2 (out 1), a hit for every later 0
    passes = [[e] for e in (0, 0, 1, 2, 0, 3, 0, 1, 2)]
    found = belady(passes, 2) if name == "belady" else simulate(passes, name, 2, 4)
    assert found == CacheCounts(*BY_HAND[name])


@pytest.mark.parametrize(("name", "hits"), [("lru", 0), ("lfu", 0), ("lfru", 0), ("least_stale", 3), ("belady", 3)])
def test_hand_computed_trace_of_passes_that_exceed_the_slots(name, hits):
    # two passes of all four experts, three slots, rounds of one: the first pass fills the slots with 0 1 2, and loads 3 in the
    # place of one of them. Least-Stale and Belady give up 2. In the second pass they hit 0 and 1, load 2 in the place of 1, and
    # hit 3
    passes = [[0, 1, 2, 3], [0, 1, 2, 3]]
    found = belady(passes, 3, 1) if name == "belady" else simulate(passes, name, 3, 4, 1)
    assert found == CacheCounts(hits, 8 - hits)


@pytest.mark.parametrize("round_size", [None, 1, 2])
@pytest.mark.parametrize("slots", [2, 3])
def test_belady_has_the_fewest_misses_of_all_ways_to_evict(slots, round_size):
    for seed in range(25):
        passes = random_passes(seed, num_experts=5, passes=8)
        assert belady(passes, slots, round_size).misses == fewest_misses(passes, slots, round_size)


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_misses_less_than_belady_and_every_use_counts_once(name):
    for seed in range(40):
        passes, slots = random_passes(seed, num_experts=9, passes=30), 1 + seed % 9
        found, bound = simulate(passes, name, slots, 9), belady(passes, slots)
        assert found.misses >= bound.misses
        assert found.hits + found.misses == bound.hits + bound.misses == sum(map(len, passes))


@pytest.mark.parametrize("name", POLICIES)
def test_with_a_slot_for_every_expert_each_expert_misses_once(name):
    passes = random_passes(0, num_experts=6, passes=40)
    assert simulate(passes, name, 6, 6).misses == belady(passes, 6).misses == len({e for p in passes for e in p})


def test_lru_and_belady_never_lose_hits_with_more_slots():
    # both are stack algorithms for passes of one round
    passes = [needed for needed in random_passes(3, num_experts=8, passes=60) if len(needed) <= 4]
    for count in (lambda slots: simulate(passes, "lru", slots, 8), lambda slots: belady(passes, slots)):
        hits = [count(slots).hits for slots in range(4, 9)]
        assert hits == sorted(hits)
        assert hits[0] < hits[-1]


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_loads_and_uses_inside_a_round_makes_no_difference(name):
    """A cache may load all missing experts of a round before it notes the uses."""
    for seed in range(20):
        passes, slots = random_passes(seed, num_experts=8, passes=30), 4
        policy, resident, misses = POLICIES[name](slots, 8), set(), 0
        for needed in passes:
            policy.begin_pass(needed)
            for part in rounds_of(needed, slots):
                for expert in reversed([e for e in part if e not in resident]):
                    misses += 1
                    if len(resident) == slots:
                        resident.remove(policy.victim(sorted(resident, reverse=True), frozenset(part)))
                    resident.add(expert)
                for expert in part:
                    policy.use(expert)
        assert misses == simulate(passes, name, slots, 8).misses


def test_rounds_are_ascending_parts_of_a_pass():
    assert list(rounds_of([0, 2, 3, 5, 7], 2, 2)) == [[0, 2], [3, 5], [7]]
    assert list(rounds_of([0, 2, 3, 5, 7], 4)) == [[0, 2], [3, 5], [7]]
    assert list(rounds_of([0, 2], 1)) == [[0], [2]]
    assert list(rounds_of([0, 2, 3, 5, 7], 4, 2)) == [[0, 2], [3, 5], [7]]
    assert list(rounds_of([0, 2, 3, 5], 4, 2)) == [[0, 2, 3, 5]]
    assert list(rounds_of([], 2)) == []


def test_a_class_of_a_policy_can_be_simulated():
    passes = random_passes(0, num_experts=6, passes=20)
    assert simulate(passes, LeastRecentlyUsed, 3, 6) == simulate(passes, "lru", 3, 6)


@pytest.mark.parametrize(
    ("passes", "slots", "round_size", "message"),
    [
        ([[1, 0]], 2, None, r"a pass of a trace is \[1, 0\]: expert ids must be distinct and ascending"),
        ([[1, 1]], 2, None, r"a pass of a trace is \[1, 1\]"),
        ([[0, 4]], 2, None, r"a pass of the trace is \[0, 4\]: the layer has the experts 0 to 3"),
        ([[-1, 0]], 2, None, r"a pass of the trace is \[-1, 0\]"),
        ([[0]], 5, None, "slots is 5: a layer of 4 experts has 1 to 4 slots"),
        ([[0]], 2, 3, "round_size is 3: a round of a layer with 2 slots has 1 to 2 experts"),
    ],
)
def test_simulate_refuses_wrong_values(passes, slots, round_size, message):
    with pytest.raises(ValueError, match=message):
        simulate(passes, "lru", slots, 4, round_size)


def test_belady_refuses_no_slot():
    with pytest.raises(ValueError, match="slots is 0: a layer needs at least 1 slot"):
        belady([[0]], 0)


def test_zipf_passes_are_reproducible_and_follow_the_law():
    passes = zipf_passes(16, 2, 4000, exponent=1.0, seed=1)
    assert passes == zipf_passes(16, 2, 4000, exponent=1.0, seed=1) != zipf_passes(16, 2, 4000, seed=2)
    assert all(len(set(needed)) == 2 and needed == sorted(needed) for needed in passes)
    first = zipf_passes(16, 1, 8000, exponent=1.0, seed=1)
    counts = sorted((sum(needed == [e] for needed in first) for e in range(16)), reverse=True)
    harmonic = sum(1 / r for r in range(1, 17))
    # five standard deviations of a binomial count
    for place in (0, 1, 3):
        share = 1 / (place + 1) / harmonic
        assert counts[place] == pytest.approx(8000 * share, abs=5 * (8000 * share) ** 0.5)


def test_lfu_loads_at_most_1_3_times_the_bound_on_a_zipf_trace_with_a_quarter_of_the_experts():
    passes = zipf_passes(64, 8, 400, exponent=1.0, seed=0)
    assert simulate(passes, "lfu", 16, 64).misses <= 1.3 * belady(passes, 16).misses


def test_comparison_adds_the_layers_and_gives_a_small_layer_a_slot_for_each_expert():
    layers = [LayerTrace("a", 8, random_passes(1, 8, 40)), LayerTrace("b", 3, random_passes(2, 3, 40))]
    found = compare_policies(Trace(layers), (2, 4))
    for slots in (2, 4):
        own = [simulate(layer.passes, "lfu", min(slots, layer.num_experts), layer.num_experts) for layer in layers]
        assert found.counts[slots]["lfu"] == (sum(c.hits for c in own), sum(c.misses for c in own))
        least = belady(layers[0].passes, slots).misses + belady(layers[1].passes, min(slots, 3)).misses
        assert found.loads_over_bound(slots, "lfu") == sum(c.misses for c in own) / least
    lines = found.table().splitlines()
    assert lines[0] == "| slots | lru | lfu | lfru | least_stale | belady |"
    assert len(lines) == 4
    assert lines[2].startswith("| 2 | ")
    assert lines[2].endswith("(1.00x) |")


def test_comparison_of_an_empty_trace_has_no_rates():
    assert "nan" in compare_policies(Trace([LayerTrace("a", 4)]), (2,)).table()
