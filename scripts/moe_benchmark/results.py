# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds the results of a run, and computes ratios from them."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from .cases import Case, shape_of
from .contestants import (
    ACCELERATE,
    ALL_SLOTS,
    COPY,
    DENSE,
    GRAPH,
    LOGGED,
    OURS,
    PEFT,
    QUARTER,
    TRANSFORMERS,
    WHOLE,
    is_foreign,
    is_ours,
)
from .measure import Failure, median_ratio
from .presets import PRESETS


@dataclass
class Result:
    """Holds the results of one case.

    Attributes:
        case: the measured case.
        times: milliseconds of each round, by contestant.
        skipped: why a contestant was not measured, by contestant, where this is not a failure of this package.
        failures: failure of each failed contestant of this package, which has no other results. `"all"` means that
            weights or inputs of the case could not be made.
        backends: back end of each implementation of this package.
        tiles: family of the Triton kernels' tiles; empty if they were not used.
        errors: largest difference relative to the oracle's largest element, by implementation and quantity.
        saved_bytes: bytes saved for backward beside parameters and inputs, by implementation.
        peak_bytes: peak of CUDA memory minus the memory before the call, by implementation.
        active_experts: number of experts with any token.
        weight_bytes: number of bytes of expert weights that must be moved.
        copied_bytes: number of bytes read and written by the contestant `"copy"`.
        floors_ms: `"compute"`, `"memory"` and `"floor"` from the stated peak of the GPU.
        loads: experts that the default policy of the expert cache loads over the fewest possible, by trace.
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
    loads: dict[str, float] = field(default_factory=dict)

    def drop(self, name: str, failure: Failure, fatal: bool = False) -> None:
        """Removes the measurements of a contestant, and records why.

        Args:
            name: name of the contestant.
            failure: what happened. Failures of other packages and missing memory are no failures of this package.
            fatal: record a failure whoever caused it, because nothing can be measured after it.
        """
        for numbers in (self.times, self.errors, self.saved_bytes, self.peak_bytes):
            numbers.pop(name, None)
        if fatal or not (failure.out_of_memory or is_foreign(name)):
            self.failures[name] = failure
        else:
            self.skipped[name] = failure.message

    @property
    def error(self) -> str | None:
        """The failures of this package in one line; None without failures."""
        return "; ".join(f"{name}: {failure.message}" for name, failure in self.failures.items()) or None

    @property
    def ours(self) -> str | None:
        """Name of this package's first measured implementation; None if `"moe"` failed or was skipped."""
        if OURS in self.failures or OURS in self.skipped:
            return None
        return next((name for name in self.times if is_ours(name)), None)

    def median(self, name: str) -> float | None:
        """Returns the median time in milliseconds, or None if the contestant was not measured."""
        times = self.times.get(name)
        return statistics.median(times) if times else None

    def best_of_transformers(self, suffix: str = "") -> str | None:
        """Returns the fastest of transformers' own implementations; with `suffix=GRAPH` the fastest in a CUDA graph."""
        measured = [name + suffix for name in TRANSFORMERS if self.times.get(name + suffix)]
        return min(measured, key=lambda name: statistics.median(self.times[name]), default=None)

    @property
    def weights_ms(self) -> float | None:
        """Time in milliseconds to move the expert weights at the bandwidth of a copy."""
        copy = self.median(COPY)
        return copy * self.weight_bytes / self.copied_bytes if copy else None

    @property
    def limit_ms(self) -> float | None:
        """Time in milliseconds of dense products of equal FLOPs; in decoding, of moving the active experts' weights."""
        if self.case.level in ("model", "lora", "watching", "offload"):
            return None
        return self.weights_ms if self.case.mode == "decode" else self.median(DENSE)

    def over(self, name: str, other: str | None) -> float | None:
        """Returns the median over rounds of the ratio of two contestants, or None if either was not measured."""
        if other is None or not (self.times.get(name) and self.times.get(other)):
            return None
        return median_ratio(self.times[name], self.times[other])

    def over_ours(self, name: str) -> float | None:
        """Returns the ratio of this package to a contestant; both are CUDA graphs if the contestant is one."""
        if self.ours is None:
            return None
        return self.over(self.ours + GRAPH if name.endswith(GRAPH) else self.ours, name)

    def over_limit(self, name: str) -> float | None:
        """Returns the ratio of a contestant to `limit_ms`."""
        if not self.limit_ms:
            return None
        decoding = self.case.mode == "decode"
        ratio = self.over(name, COPY if decoding else DENSE)
        return ratio * self.copied_bytes / self.weight_bytes if decoding and ratio is not None else ratio

    def over_floor(self, name: str) -> float | None:
        """Returns the ratio of a contestant to the floor from the GPU's stated peak."""
        median = self.median(name)
        return median / self.floors_ms["floor"] if median is not None and self.floors_ms else None

    def ratios(self) -> dict[str, float]:
        """Returns the ratios of this package to others, by name, without those that were not measured.

        Ratios of times are medians over rounds.
        """
        ours = self.ours
        if ours is None:
            return {}
        graph = ours + GRAPH
        if self.case.level == "lora":
            ratios = {f"ours/{name}": self.over(ours, name) for name in self.times if name != ours}
        elif self.case.level == "watching":
            ratios = {f"logged/{alone}": self.over(name, alone) for name, alone in LOGGED.items()}
        elif self.case.level == "offload":
            ratios = {
                "slots for all/whole": self.over(ALL_SLOTS, WHOLE),
                "quarter/whole": self.over(QUARTER, WHOLE),
                "Accelerate/quarter": self.over(ACCELERATE, QUARTER),
            }
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
        """Returns all fields, medians and ratios in JSON's types."""
        medians = {name: self.median(name) for name in self.times}
        derived = {"best_of_transformers": self.best_of_transformers(), "limit_ms": self.limit_ms}
        return asdict(self) | {"error": self.error, "median_ms": medians} | derived | {"ratios": self.ratios()}


@dataclass
class Comparison:
    """Compares two cases that differ in one property, each relative to the dense products measured in turns with it.

    Attributes:
        case: the case that varies.
        base: the case that it is compared with.
        ratio: (this package's time - time to move the weights) / time of dense products, of `case` over `base`; for
            another routing the time to move the weights is not subtracted.
    """

    case: Case
    base: Case
    ratio: float


def compare_cases(results: list[Result]) -> list[Comparison]:
    """Compares every unbalanced routing with the balanced one, and every number of experts with the smallest."""
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
    """Returns the ratio of this package to the dense products, without the time to move the weights if asked for."""
    ours = None if result.ours is None else result.median(result.ours)
    weights = result.weights_ms if without_weights else 0.0
    products = result.median(DENSE)
    if ours is None or weights is None or products is None:
        raise ValueError(
            f"{result.case} cannot be compared: this package, the copy or the products were not measured."
        )
    return (ours - weights) / products


def _same_but_experts(a: Case, b: Case) -> bool:
    same = (a.level, a.dtype, a.tokens, a.routing, a.mode) == (b.level, b.dtype, b.tokens, b.routing, b.mode)
    return same and shape_of(a) == shape_of(b)
