# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module replays a trace of expert uses through a cache without a model, and computes the fewest misses that are possible.

The simulation follows the contract of the cache and shares no code with the cache, so that each can check the other:

- a pass is a list of distinct expert ids in ascending order, and is one round if S slots hold all of them; a larger pass is cut
  into rounds of S // 2 experts, at least 1, so that the other slots can keep experts for later rounds;
- all experts of a round are resident at the same time; an expert that is not resident is a miss and is loaded into a free
  slot, or into the slot of an evicted expert outside the round.

# S slots, E experts
"""

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from .policies import Policy, policy_class


Pass = Sequence[int]


class CacheCounts(NamedTuple):
    """What a cache did over a trace.

    Attributes:
        hits: number of uses of an expert that was resident when the expert's round began.
        misses: number of uses for which the expert was loaded.
    """

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Returns the hits as a share of all uses; NaN without a use."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else float("nan")


def rounds_of(needed: Pass, slots: int, round_size: int | None = None) -> Iterator[Pass]:
    """Yields the rounds of a pass in ascending order: one round if the pass fits into the slots, else `round_size` experts each.

    By default `round_size` is S // 2, and at least 1.

    Raises:
        ValueError: if the ids are not distinct and ascending, if there is no slot, or if `round_size` is not in 1..S.
    """
    if slots < 1:
        raise ValueError(f"slots is {slots}: a layer needs at least 1 slot")
    if round_size is not None and not 1 <= round_size <= slots:
        raise ValueError(f"round_size is {round_size}: a round of a layer with {slots} slots has 1 to {slots} experts")
    if any(left >= right for left, right in itertools.pairwise(needed)):
        raise ValueError(f"a pass of a trace is {list(needed)}: expert ids must be distinct and ascending")
    size = slots if len(needed) <= slots else round_size or max(1, slots // 2)
    for begin in range(0, len(needed), size):
        yield needed[begin : begin + size]


def simulate(
    passes: Sequence[Pass],
    policy: str | type[Policy],
    slots: int,
    num_experts: int,
    round_size: int | None = None,
) -> CacheCounts:
    """Replays the passes of one layer through an empty cache.

    Example:
        >>> simulate([[0, 1], [0, 2], [1, 2]], "lru", slots=2, num_experts=3)
        CacheCounts(hits=2, misses=4)

    Args:
        passes: passes of the layer, each the distinct expert ids in ascending order.
        policy: name of a policy in [`~modeling_moe.offload.policies.POLICIES`], or the class of a policy.
        slots: number S of slots.
        num_experts: number E of experts.
        round_size: most experts in a round of a pass that exceeds the slots, at most S; S // 2 by default, as in the cache.

    Raises:
        ValueError: for an unknown policy, a number of slots outside 1..E, and a pass that is not ascending or that names an
            expert of E or more.
    """
    rule = (policy_class(policy) if isinstance(policy, str) else policy)(slots, num_experts)
    resident: set[int] = set()
    hits = misses = 0
    for needed in passes:
        if needed and not 0 <= min(needed) <= max(needed) < num_experts:
            raise ValueError(
                f"a pass of the trace is {list(needed)}: the layer has the experts 0 to {num_experts - 1}"
            )
        rule.begin_pass(needed)
        for part in rounds_of(needed, slots, round_size):
            for expert in part:
                if expert in resident:
                    hits += 1
                else:
                    misses += 1
                    if len(resident) == slots:
                        resident.remove(rule.victim(resident, part))
                    resident.add(expert)
                rule.use(expert)
    return CacheCounts(hits, misses)


def belady(passes: Sequence[Pass], slots: int, round_size: int | None = None) -> CacheCounts:
    """Replays the passes of one layer with the fewest misses that any cache can have which knows the whole trace.

    The rule evicts the resident expert outside the round whose next round comes last (L. A. Belady, "A study of replacement
    algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966). Prefetching cannot load fewer experts either:
    a load that is put off until its expert is used costs the same.

    Args:
        passes: passes of the layer, each the distinct expert ids in ascending order.
        slots: number S of slots.
        round_size: most experts in a round of a pass that exceeds the slots, at most S; S // 2 by default, as in the cache.

    Raises:
        ValueError: if there is no slot, or a pass is not ascending.
    """
    rounds = [part for needed in passes for part in rounds_of(needed, slots, round_size)]
    never = len(rounds)
    following: list[dict[int, int]] = []  # of each round: expert -> number of the round that uses the expert next
    upcoming: dict[int, int] = {}
    for number in range(len(rounds) - 1, -1, -1):
        following.append({expert: upcoming.get(expert, never) for expert in rounds[number]})
        upcoming.update(dict.fromkeys(rounds[number], number))
    following.reverse()
    next_use: dict[int, int] = {}  # of each resident expert
    hits = misses = 0
    for part, later in zip(rounds, following, strict=True):
        absent = [expert for expert in part if expert not in next_use]
        hits, misses = hits + len(part) - len(absent), misses + len(absent)
        for expert in absent:
            if len(next_use) == slots:
                del next_use[_latest(next_use, part)]
            next_use[expert] = later[expert]
        next_use.update(later)
    return CacheCounts(hits, misses)


def _latest(next_use: dict[int, int], kept: Collection[int]) -> int:
    """Returns the expert outside `kept` whose next use comes last."""
    return max((expert for expert in next_use if expert not in kept), key=lambda expert: next_use[expert])


def zipf_passes(
    num_experts: int, top_k: int, passes: int, *, exponent: float = 1.0, tokens: int = 1, seed: int = 0
) -> list[list[int]]:
    """Draws passes whose tokens choose experts independently with the probabilities of Zipf's law.

    Each token draws `top_k` distinct experts one after the other, expert number r with a probability proportional to
    `r**-exponent`. The popular experts are spread over the ids at random. There is no locality beyond the popularity.

    Args:
        num_experts: number E of experts.
        top_k: number of experts of a token, at most E.
        passes: number of passes.
        exponent: exponent of the law; 0 draws all experts alike.
        tokens: number of tokens in each pass.
        seed: seed of the draws.
    """
    draw = random.Random(seed)
    order = draw.sample(range(num_experts), num_experts)
    weight = {expert: (place + 1) ** -exponent for place, expert in enumerate(order)}
    drawn = []
    for _ in range(passes):
        needed: set[int] = set()
        for _ in range(tokens):
            left = dict(weight)
            for _ in range(top_k):
                expert = draw.choices(list(left), list(left.values()))[0]
                needed.add(expert)
                del left[expert]
        drawn.append(sorted(needed))
    return drawn
