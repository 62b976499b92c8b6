"""This module tests the eviction rules by hand-computed orders of eviction."""

import pytest

from modeling_moe.offload.policies import POLICIES, LeastStale, policy_class


ALL = (0, 1, 2, 3)


def order_of_eviction(name: str, passes: list[list[int]], kept: tuple[int, ...] = ()) -> list[int]:
    """Returns the experts in the order in which the policy would evict them all after the passes."""
    policy = policy_class(name)(4, 8)
    for needed in passes:
        policy.begin_pass(needed)
        for expert in needed:
            policy.use(expert)
    resident, order = set(ALL), []
    while resident - set(kept):
        order.append(policy.victim(resident, kept))
        resident.remove(order[-1])
    return order


def test_lru_evicts_the_longest_unused_expert_first():
    assert order_of_eviction("lru", [[0, 1], [2, 3], [0]]) == [1, 2, 3, 0]


def test_lfu_evicts_the_expert_of_the_fewest_passes_and_then_the_longest_unused_one():
    # counts 3, 1, 2, 1; expert 3 was used after expert 1
    assert order_of_eviction("lfu", [[0, 1], [0, 2], [0, 2, 3]]) == [1, 3, 2, 0]


def test_lfru_adds_uses_that_halve_every_32_passes():
    # in units of a use in pass 0: expert 0 has 3 uses, about 3.13; expert 1 has 1 in pass n, 2 ** (n / 32), which is 3.08 for
    # n = 52 and 3.15 for n = 53; experts 2 and 3 have none and about 1.1
    for last, order in ((52, [2, 3, 1, 0]), (53, [2, 3, 0, 1])):
        passes = [[0], [0], [0], [3], *[[] for _ in range(last - 5)], [1]]
        assert len(passes) == last
        assert order_of_eviction("lfru", passes) == order


def test_lfru_is_lfu_for_uses_in_the_same_passes_and_lru_for_single_uses():
    assert order_of_eviction("lfru", [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0]]) == [3, 2, 1, 0]
    assert order_of_eviction("lfru", [[2], [0], [3], [1]]) == [2, 0, 3, 1]


def test_least_stale_evicts_unneeded_experts_then_finished_ones_then_those_ahead():
    policy = LeastStale(6, 8)
    policy.begin_pass([4, 5])
    policy.use(5)
    policy.use(4)
    policy.begin_pass([0, 1, 2, 3])
    policy.use(0)
    policy.use(1)
    resident, order = {0, 1, 2, 3, 4, 5}, []
    while resident:
        order.append(policy.victim(resident, ()))
        resident.remove(order[-1])
    assert order == [5, 4, 1, 0, 3, 2]


def test_least_stale_is_lru_for_passes_that_fit_into_the_slots():
    passes = [[0, 1], [2, 3], [0]]
    assert order_of_eviction("least_stale", passes, kept=(0,)) == order_of_eviction("lru", passes, kept=(0,))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_spares_kept_experts_and_evicts_a_never_used_one_first(name):
    assert order_of_eviction(name, [[0, 1, 3]], kept=(1,))[0] == 2
    assert 1 not in order_of_eviction(name, [[0, 1, 3]], kept=(1,))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_breaks_ties_by_the_lowest_id_whatever_the_order_of_the_resident_experts(name):
    policy = POLICIES[name](4, 8)
    assert policy.victim((3, 1, 2), ()) == policy.victim((2, 3, 1), ()) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_refuses_to_evict_when_all_experts_are_kept(name):
    with pytest.raises(ValueError, match="all 2 resident experts are kept"):
        POLICIES[name](2, 8).victim((0, 1), (0, 1, 2))


@pytest.mark.parametrize("slots", [0, 9])
def test_policies_refuse_a_number_of_slots_that_no_layer_has(slots):
    with pytest.raises(ValueError, match=f"slots is {slots}: a layer of 8 experts has 1 to 8 slots"):
        POLICIES["lru"](slots, 8)


def test_an_unknown_policy_is_refused_with_the_names_of_the_catalogue():
    with pytest.raises(ValueError, match="policy is 'fifo': choose one of lru, lfu, lfru, least_stale"):
        policy_class("fifo")
