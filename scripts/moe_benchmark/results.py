# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a run found, and the ratios that follow from it."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from .cases import Case, shape_of
from .contestants import COPY, DENSE, GRAPH, OURS, PEFT, TRANSFORMERS, is_foreign, is_ours
from .measure import Failure, median_ratio
from .presets import PRESETS


@dataclass
class Result:
    """One case.

    Attributes:
        case: what was measured.
        times: contestant -> milliseconds of each round.
        skipped: contestant -> why it was not measured, where that is no failure of this package.
        failures: contestant of this package -> what went wrong; no other number of it is here. `"all"` stands for the
            case, whose weights or inputs could not be made.
        backends: our implementations -> what computed them.
        tiles: family of the Triton kernels' tiles; empty where they computed nothing.
        errors: implementation -> quantity -> largest difference to the oracle over its largest element.
        saved_bytes: implementation -> bytes kept for backward beside parameters and input.
        peak_bytes: implementation -> CUDA memory beyond what was there before.
        active_experts: experts with any token.
        weight_bytes: of expert weights that must move.
        copied_bytes: read plus written by the contestant `"copy"`.
        floors_ms: `"compute"`, `"memory"`, `"floor"` by the stated peak of the GPU.
    """

    case: Case
    times: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    tiles: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    active_experts: int = 0
    weight_bytes: int = 0
    copied_bytes: int = 0
    floors_ms: dict[str, float] = field(default_factory=dict)

    def drop(self, name: str, failure: Failure, fatal: bool = False) -> None:
        """Takes out what was measured of a contestant, and says why.

        Args:
            name: the contestant.
            failure: what happened to it. Somebody else's, and a want of memory, are no failures of this package.
            fatal: count it as a failure whoever it is, since nothing after it can be measured.
        """
        for numbers in (self.times, self.errors, self.saved_bytes, self.peak_bytes):
            numbers.pop(name, None)
        if fatal or not (failure.out_of_memory or is_foreign(name)):
            self.failures[name] = failure
        else:
            self.skipped[name] = failure.message

    @property
    def error(self) -> str | None:
        """What went wrong in one line, or None if nothing of this package did."""
        return "; ".join(f"{name}: {failure.message}" for name, failure in self.failures.items()) or None

    @property
    def ours(self) -> str | None:
        """The first of our implementations; None if it, or `"moe"`, was not measured: no other takes its place."""
        if OURS in self.failures or OURS in self.skipped:
            return None
        return next((name for name in self.times if is_ours(name)), None)

    def median(self, name: str) -> float | None:
        """Milliseconds, or None if it was not measured."""
        times = self.times.get(name)
        return statistics.median(times) if times else None

    def best_of_transformers(self, suffix: str = "") -> str | None:
        """The fastest of transformers' own implementations; with `suffix=GRAPH` of those in a CUDA graph."""
        measured = [name + suffix for name in TRANSFORMERS if self.times.get(name + suffix)]
        return min(measured, key=lambda name: statistics.median(self.times[name]), default=None)

    @property
    def weights_ms(self) -> float | None:
        """Time to move the expert weights at the bandwidth of a copy."""
        copy = self.median(COPY)
        return copy * self.weight_bytes / self.copied_bytes if copy else None

    @property
    def limit_ms(self) -> float | None:
        """Dense products of the same FLOPs; in decoding the active experts' bytes over bandwidth."""
        if self.case.level in ("model", "lora"):
            return None
        return self.weights_ms if self.case.mode == "decode" else self.median(DENSE)

    def over(self, name: str, other: str | None) -> float | None:
        """Median over the rounds of the ratio of two contestants, or None if either was not measured."""
        if other is None or not (self.times.get(name) and self.times.get(other)):
            return None
        return median_ratio(self.times[name], self.times[other])

    def over_ours(self, name: str) -> float | None:
        """Ours over a contestant, both as CUDA graphs if that is one."""
        ours = f"{self.ours}{GRAPH}" if name.endswith(GRAPH) else self.ours
        return self.over(ours, name)

    def over_limit(self, name: str) -> float | None:
        """A contestant over `limit_ms`."""
        if not self.limit_ms:
            return None
        decoding = self.case.mode == "decode"
        ratio = self.over(name, COPY if decoding else DENSE)
        return ratio * self.copied_bytes / self.weight_bytes if decoding and ratio is not None else ratio

    def over_floor(self, name: str) -> float | None:
        """A contestant over the floor that the GPU's stated peak gives."""
        median = self.median(name)
        return median / self.floors_ms["floor"] if median is not None and self.floors_ms else None

    def ratios(self) -> dict[str, float]:
        """Ours over others, by name; what was not measured is left out. Those of times are medians over the rounds."""
        ours = self.ours
        if ours is None:
            return {}
        graph = ours + GRAPH
        if self.case.level == "lora":
            ratios = {f"ours/{name}": self.over(ours, name) for name in self.times if name != ours}
        else:
            ratios = {
                "ours/transformers": self.over(ours, self.best_of_transformers()),
                "ours/transformers (graph)": self.over(graph, self.best_of_transformers(GRAPH)),
                "ours/limit": self.over_limit(ours),
                "ours/limit (graph)": self.over_limit(graph),
                "ours/roofline": self.over_floor(graph if self.times.get(graph) else ours),
            }
        for other in ("grouped_mm", PEFT):
            for name, memory in (("saved", self.saved_bytes), ("peak", self.peak_bytes)):
                if memory.get(ours) and memory.get(other):
                    ratios[f"{name}/{other}"] = memory[ours] / memory[other]
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def to_json(self) -> dict[str, Any]:
        """Everything, medians and ratios included."""
        medians = {name: self.median(name) for name in self.times}
        derived = {"best_of_transformers": self.best_of_transformers(), "limit_ms": self.limit_ms}
        return asdict(self) | {"error": self.error, "median_ms": medians} | derived | {"ratios": self.ratios()}


@dataclass
class Comparison:
    """Two cases that differ in one thing only, each over the dense products that took turns with it.

    Attributes:
        case: the one that varies.
        base: the one it is compared with.
        ratio: (ours - time to move the weights) / dense of `case`, over the same of `base`; for another routing the
            weights' time stays in.
    """

    case: Case
    base: Case
    ratio: float


def compare_cases(results: list[Result]) -> list[Comparison]:
    """Every unbalanced routing with the balanced one, and every number of experts with the smallest."""
    by_case = {result.case: result for result in results if result.ours and result.median(DENSE)}
    comparisons = []
    for case, result in by_case.items():
        balanced = Case(case.level, case.preset, case.dtype, case.tokens, "balanced", case.mode)
        if case.routing not in ("balanced", "router") and balanced in by_case:
            ratio = _over_dense(result) / _over_dense(by_case[balanced])
            comparisons.append(Comparison(case, balanced, ratio))
        rivals = [other for other in by_case if _same_but_experts(case, other)]
        fewest = min(rivals, key=lambda other: PRESETS[other.preset].experts)
        if PRESETS[fewest.preset].experts < PRESETS[case.preset].experts:
            ratio = _over_dense(result, without_weights=True) / _over_dense(by_case[fewest], without_weights=True)
            comparisons.append(Comparison(case, fewest, ratio))
    return comparisons


def _over_dense(result: Result, without_weights: bool = False) -> float:
    weights = result.weights_ms if without_weights else 0.0
    return (result.median(result.ours) - weights) / result.median(DENSE)


def _same_but_experts(a: Case, b: Case) -> bool:
    same = (a.level, a.dtype, a.tokens, a.routing, a.mode) == (b.level, b.dtype, b.tokens, b.routing, b.mode)
    return same and shape_of(a) == shape_of(b)
