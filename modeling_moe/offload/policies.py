# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the rules by which a layer's expert cache evicts experts, and the catalogue [`POLICIES`] of them.

A policy belongs to one layer. It orders the resident experts, and the cache evicts the expert of the lowest rank that the
running round does not need. Policies are deterministic and decide only what stays in memory, never what is computed.

# S slots, E experts, a pass is one call of the layer's experts, a round is a part of a pass of at most S experts
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any


class Policy(ABC):
    """A Policy chooses which resident expert of a layer gives up its slot; a subclass implements `rank`.

    Args:
        slots: number S of the layer's slots.
        num_experts: number E of the layer's experts.

    Raises:
        ValueError: if there is no slot, or more slots than experts.
    """

    def __init__(self, slots: int, num_experts: int):
        if not 1 <= slots <= num_experts:
            raise ValueError(f"slots is {slots}: a layer of {num_experts} experts has 1 to {num_experts} slots")
        self.slots, self.num_experts = slots, num_experts
        self._passes = 0
        self._uses = 0
        self._last_use = [0] * num_experts  # number of the use, counted over all experts; 0 before the first

    def begin_pass(self, needed: Sequence[int]) -> None:
        """Starts a pass that will use the experts `needed`, which are distinct and ascending ids."""
        self._passes += 1

    def use(self, expert: int) -> None:
        """Notes that the pass uses a resident expert, after a hit or a load."""
        self._uses += 1
        self._last_use[expert] = self._uses

    @abstractmethod
    def rank(self, expert: int) -> Any:
        """Returns a number or a tuple; the resident expert whose rank is lowest is evicted first."""

    def victim(self, resident: Collection[int], kept: Collection[int]) -> int:
        """Returns the expert to evict: the one of lowest rank among the resident ones outside `kept`.

        The cost is O(S). Equal ranks evict the lowest id.

        Raises:
            ValueError: if every resident expert is kept.
        """
        candidates = [expert for expert in resident if expert not in kept]
        if not candidates:
            raise ValueError(
                f"all {len(resident)} resident experts are kept: a round needs at most {self.slots} experts"
            )
        return min(candidates, key=lambda expert: (self.rank(expert), expert))


class LeastRecentlyUsed(Policy):
    """LRU evicts the expert whose last use is longest ago (per layer as in mixtral-offloading, arXiv:2312.17238).

    An expert that was prefetched and never used goes first. Where passes use nearly all experts in ascending order, LRU evicts
    each expert just before the next use.
    """

    def rank(self, expert: int) -> int:
        """Returns the number of the last use."""
        return self._last_use[expert]


class LeastFrequentlyUsed(Policy):
    """LFU evicts the expert that the fewest passes have used so far (compared with LRU for MoE in arXiv:2511.05814).

    Counts outlive an eviction. Among equal counts the least recently used expert goes first.
    """

    def __init__(self, slots: int, num_experts: int):
        super().__init__(slots, num_experts)
        self._counts = [0] * num_experts

    def use(self, expert: int) -> None:
        """Adds the use to the count of the expert."""
        super().use(expert)
        self._counts[expert] += 1

    def rank(self, expert: int) -> tuple[int, int]:
        """Returns the count and the number of the last use."""
        return self._counts[expert], self._last_use[expert]


# passes after which a use counts half for LFRU
HALF_LIFE = 32


class FrequencyWeightedLRU(Policy):
    """LFRU evicts the expert with the lowest sum of uses, in which a use counts half after every 32 further passes.

    A frequent expert thus stays resident through a pause, and leaves when the text has moved on. The rule is LRFU of Lee et al.
    ("LRFU: a spectrum of policies that subsumes the least recently used and least frequently used policies", IEEE Transactions
    on Computers 50(12), 2001) with lambda = 1/32; the name is that of vLLM's pull request 37190 for experts.
    """

    def __init__(self, slots: int, num_experts: int):
        super().__init__(slots, num_experts)
        # base-2 logarithm of the sum, in which a use in pass p counts 2 ** (p / HALF_LIFE): the order is that of today's sums
        self._weight = [-math.inf] * num_experts

    def use(self, expert: int) -> None:
        """Adds the use to the sum of the expert."""
        super().use(expert)
        now = self._passes / HALF_LIFE
        self._weight[expert] = now + math.log2(1 + 2 ** (self._weight[expert] - now))

    def rank(self, expert: int) -> tuple[float, int]:
        """Returns the logarithm of the sum, and the number of the last use."""
        return self._weight[expert], self._last_use[expert]


class LeastStale(Policy):
    """Least-Stale keeps the experts that the running pass still has ahead, and evicts what the pass is through with.

    The idea is SpecMD's (arXiv:2602.03921): within a forward pass the order of accesses is known, so an expert whose turn is
    still to come must not give way to one whose turn is over. The paper shares one cache among all layers. Here each layer has
    slots of its own and uses the experts of a pass in ascending order, and the rule becomes, in the order of eviction:

    1. experts that the running pass does not use, the least recently used first;
    2. experts that the running pass has used already, the most recently used first: if the next pass uses all of them again,
       in ascending order, the last one comes latest;
    3. experts that the running pass still has ahead, the highest id first, since that one comes last.

    A pass that fits into the slots, such as one decoded token, only meets class 1 and is LRU.
    """

    def __init__(self, slots: int, num_experts: int):
        super().__init__(slots, num_experts)
        self._ahead: set[int] = set()
        self._done: set[int] = set()

    def begin_pass(self, needed: Sequence[int]) -> None:
        """Notes the experts that are ahead."""
        super().begin_pass(needed)
        self._ahead, self._done = set(needed), set()

    def use(self, expert: int) -> None:
        """Moves the expert from those ahead to those that are done."""
        super().use(expert)
        self._ahead.discard(expert)
        self._done.add(expert)

    def rank(self, expert: int) -> tuple[int, int]:
        """Returns the class of the rule, and the place in the class."""
        if expert in self._ahead:
            return 2, -expert
        if expert in self._done:
            return 1, -self._last_use[expert]
        return 0, self._last_use[expert]


# name -> policy
POLICIES: dict[str, type[Policy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "lfru": FrequencyWeightedLRU,
    "least_stale": LeastStale,
}


def policy_class(name: str) -> type[Policy]:
    """Returns the policy of a name.

    Raises:
        ValueError: if [`POLICIES`] has no policy of that name; the message lists the names.
    """
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]
