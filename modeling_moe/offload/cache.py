# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The expert cache of a layer copies the experts that a pass needs into slots, and keeps them there for later passes.

# T tokens, K experts per token, S slots, E experts; a pass is one call of the layer's experts
"""

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .policies import Policy
from .slots import ExpertSlots
from .statistics import LayerStatistics
from .stores import ExpertStore


# up to this many assignments, a Python set finds the distinct experts faster than tensor operations do
FEW_ASSIGNMENTS = 256


class Round(NamedTuple):
    """A Round is a part of a pass: the experts whose ids lie from `first` to `last` and that the pass needs."""

    first: int
    last: int


class ExpertCache:
    """ExpertCache keeps some experts of a layer in slots.

    One pass runs at a time: a pass of another thread waits for the end of the running one. [`ExpertCache.prefetch`] may
    be called by any thread.

    Args:
        store: gives the experts.
        policy: chooses the expert that gives up its slot.
        slots: the memory, with as many slots as the policy was made for.
        statistics: counts hits, misses and bytes.
    """

    def __init__(self, store: ExpertStore, policy: Policy, slots: ExpertSlots, statistics: LayerStatistics):
        self.store, self.policy, self.slots, self.statistics = store, policy, slots, statistics
        self.num_experts = store.num_experts
        self._expert_bytes = sum(tensor[0].nbytes for tensor in slots.tensors.values())
        self.device = next(iter(slots.tensors.values())).device
        # on a GPU, the end of the last pass
        self._computed: Any = None
        self._pass = threading.Lock()
        # guards all below; a thread waits on it for the end of another one's copy
        self._changed = threading.Condition()
        self._kept: frozenset[int] = frozenset()  # by the running round: their slots are read
        self._wanted: frozenset[int] = frozenset()  # by the running pass: not evicted by a prefetch
        self._passes = 0  # number of passes that have begun
        self._reading: int | None = None  # the expert that the pass is copying
        self._ahead: dict[int, int] = {}  # experts that prefetches are copying -> their slots
        self._interrupted = False  # True while a pass runs, and after one that Ctrl+C ended
        self._unused: set[int] = set()  # prefetched, and not yet used

    def needed(self, index: torch.Tensor) -> list[int]:
        """Returns the distinct expert ids of `index` (T, K) in ascending order, without those of empty assignments."""
        if index.numel() <= FEW_ASSIGNMENTS:
            return sorted({expert for expert in index.flatten().tolist() if 0 <= expert < self.num_experts})
        # the last place is that of empty assignments
        chosen = torch.zeros(self.num_experts + 1, dtype=torch.bool, device=index.device)
        chosen[torch.where(index < 0, self.num_experts, index).clamp_(max=self.num_experts).flatten()] = True
        return chosen[:-1].nonzero().flatten().tolist()

    @contextmanager
    def running(self, needed: list[int]) -> Iterator[Iterator[Round]]:
        """Runs a pass, which needs the experts `needed`, ascending ids.

        Inside the block it gives the rounds in ascending order of ids. While a round is current, all of its experts are
        resident, and no other thread evicts them.
        """
        with self._pass:
            with self._changed:
                if self._interrupted:
                    self._forget()
                self._interrupted = True
                self._wanted = frozenset(needed)
                self._passes += 1
                self.policy.begin_pass(needed)
            try:
                yield self._rounds(needed)
                self._interrupted = False
            except Exception:
                self._interrupted = False
                raise
            finally:
                with self._changed:
                    if self.device.type == "cuda":
                        self._computed = torch.cuda.current_stream(self.device).record_event()
                    self._kept = self._wanted = frozenset()
                    self._changed.notify_all()

    def _forget(self) -> None:
        """Empties all slots but those that prefetches are filling.

        Ctrl+C may end a pass between any two lines, and thus leave a slot that is taken and that nothing fills.
        """
        self.slots.clear(self._ahead.values())
        self._reading = None
        self._unused.clear()

    def number_of_rounds(self, needed: list[int]) -> int:
        """Returns the number of rounds of a pass."""
        return -(-len(needed) // self._round_size(needed))

    def _round_size(self, needed: list[int]) -> int:
        """Returns the number of experts in each round of a pass but the last one.

        A round needs all of its experts at once. If a pass exceeds the slots, a round takes half of them, so that the other
        half can keep experts of earlier and later rounds.
        """
        slots = len(self.slots.experts)
        return slots if len(needed) <= slots else max(1, slots // 2)

    def _rounds(self, needed: list[int]) -> Iterator[Round]:
        size = self._round_size(needed)
        for start in range(0, len(needed), size):
            experts = needed[start : start + size]
            self._make_resident(experts)
            yield Round(experts[0], experts[-1])

    def _make_resident(self, experts: list[int]) -> None:
        """Copies the missing experts of a round into slots and counts hits and misses."""
        statistics, places = self.statistics, self.slots.places
        with self._changed:
            self._kept = frozenset(experts)
            missing = [expert for expert in experts if places[expert] < 0]
            statistics.hits += len(experts) - len(missing)
            if not missing:
                self._use(experts)
                return
        begin = time.perf_counter()
        for expert in missing:
            self._load_or_wait(expert)
        statistics.stall_seconds += time.perf_counter() - begin
        with self._changed:
            self._use(experts)

    def _use(self, experts: list[int]) -> None:
        """Tells the policy which experts are used, and counts those that were prefetched."""
        for expert in experts:
            self.policy.use(expert)
        if self._unused:
            self.statistics.prefetched_used += len(self._unused & self._kept)
            self._unused -= self._kept

    def _load_or_wait(self, expert: int) -> None:
        """Copies an expert of the running round into a slot, unless a prefetch is doing so or has done so."""
        with self._changed:
            while True:
                if self.slots.places[expert] >= 0:  # a prefetch has copied it in the meantime
                    self.statistics.hits += 1
                    return
                slot = None if expert in self._ahead else self._claim(self._kept)
                if slot is not None:
                    break
                self._changed.wait()
            self._reading = expert
        self._load(expert, slot, ahead=False)

    def _claim(self, kept: Collection[int]) -> int | None:
        """Returns a slot that is free or was freed by the policy, or None if no expert outside `kept` is resident.

        The slot counts as taken from now on.
        """
        slot = self.slots.take()
        if slot is not None:
            return slot
        resident = self.slots.resident
        if all(expert in kept for expert in resident):
            return None
        victim = self.policy.victim(resident, kept)
        self._unused.discard(victim)
        self.slots.release(self.slots.places[victim])
        return self.slots.take()

    def _load(self, expert: int, slot: int, ahead: bool) -> None:
        """Copies an expert into a claimed slot, on the current stream of a GPU. An error frees the slot again.

        Args:
            ahead: True for a prefetch, which waits for the end of the copy on a GPU.
        """
        try:
            if self._computed is not None:  # until then the slot is read
                self._computed.wait()
            self.store.read(expert, self.slots.memory(slot))
            if ahead and self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        except BaseException:
            with self._changed:
                self.slots.release(slot)
                self._copied(expert, ahead)
            raise
        with self._changed:
            self.slots.put(expert, slot)
            self._copied(expert, ahead)
            self.statistics.bytes_read += self._expert_bytes
            if ahead:
                self.statistics.prefetched += 1
                self._unused.add(expert)
            else:
                self.statistics.misses += 1

    def _copied(self, expert: int, ahead: bool) -> None:
        """Notes the end of a copy, which other threads may wait for."""
        if ahead:
            del self._ahead[expert]
        else:
            self._reading = None
        self._changed.notify_all()

    def prefetch(self, experts: Collection[int]) -> None:
        """Copies experts that a later pass may need into slots that the running pass does not need.

        Experts that are resident, or for which no slot can be freed, are left out. So is what a pass does not need that begins
        in the meantime. An error while reading is not raised here: a pass that needs the expert reads it again, and raises
        what it then meets.

        Args:
            experts: ids, the most probable ones first.
        """
        asked, passes = frozenset(experts), self._passes
        for expert in experts:
            with self._changed:
                late = self._passes != passes and expert not in self._wanted
                if late or self.slots.places[expert] >= 0 or expert in self._ahead or expert == self._reading:
                    continue
                slot = self._claim(self._wanted | asked)
                if slot is None:
                    return
                self._ahead[expert] = slot
            try:
                self._load(expert, slot, ahead=True)
            except Exception:
                return
