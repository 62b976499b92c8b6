# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module compares the policies on a recorded trace, beside Belady's bound."""

from collections.abc import Sequence
from dataclasses import dataclass

from .policies import POLICIES
from .recording import Trace
from .simulation import CacheCounts, belady, simulate


@dataclass(frozen=True)
class PolicyComparison:
    """PolicyComparison holds what each policy would do with a trace.

    Attributes:
        counts: number of slots of each layer -> name of the policy, or "belady" -> hits and misses of all layers together.
    """

    counts: dict[int, dict[str, CacheCounts]]

    def loads_over_bound(self, slots: int, policy: str) -> float:
        """Returns the experts that a policy loads, divided by the fewest possible; NaN for an empty trace."""
        least = self.counts[slots]["belady"].misses
        return self.counts[slots][policy].misses / least if least else float("nan")

    def table(self) -> str:
        """Returns a Markdown table: a row for each number of slots, the hit rate and the loads over Belady's for each policy."""
        names = [*POLICIES, "belady"]
        lines = [f"| slots | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
        for slots, row in self.counts.items():
            cells = [f"{row[name].hit_rate:.1%} ({self.loads_over_bound(slots, name):.2f}x)" for name in names]
            lines.append(f"| {slots} | {' | '.join(cells)} |")
        return "\n".join(lines)


def compare_policies(trace: Trace, slots: Sequence[int], round_size: int | None = None) -> PolicyComparison:
    """Replays a trace through every policy of the catalogue and through Belady's rule, each layer by itself.

    Example:
        >>> print(compare_policies(Trace.load("trace.json"), slots=(4, 8)).table())

    Args:
        trace: trace of a model.
        slots: numbers of slots of each layer; a layer with fewer experts has a slot for each of them.
        round_size: most experts in a round, see [`~modeling_moe.offload.simulation.simulate`].

    Raises:
        ValueError: for a number of slots below 1.
    """
    return PolicyComparison({number: _counts(trace, number, round_size) for number in slots})


def _counts(trace: Trace, slots: int, round_size: int | None) -> dict[str, CacheCounts]:
    """Returns hits and misses of all layers together, for each policy and for Belady's rule."""
    found: dict[str, list[CacheCounts]] = {name: [] for name in (*POLICIES, "belady")}
    for layer in trace.layers:
        own = min(slots, layer.num_experts)
        for name in POLICIES:
            found[name].append(simulate(layer.passes, name, own, layer.num_experts, round_size))
        found["belady"].append(belady(layer.passes, own, round_size))
    return {name: CacheCounts(sum(c.hits for c in each), sum(c.misses for c in each)) for name, each in found.items()}
