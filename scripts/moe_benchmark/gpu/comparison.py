# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `comparison`: the benchmark's runner against grouped_mm, Liger and the dense products.

Each case is checked against the float64 oracle before it is timed, as in `scripts/benchmark.py`.
"""

from collections.abc import Mapping

from ..arguments import BenchmarkArguments
from ..case_runner import CaseRunner
from ..cases import Case
from ..results import Result
from ..runner import Runner
from .results import DeviceLost, Results
from .sizes import Size


IMPLEMENTATIONS = ["moe", "moe_recompute", "grouped_mm", "liger"]


def run(results: Results, size: Size) -> None:
    """Writes a line for each case of `size.comparison`."""
    settings = {"case_s": size.case_s, "rounds": size.case_rounds, "implementations": IMPLEMENTATIONS}
    runner = Runner(BenchmarkArguments(device="cuda", **settings))
    for preset, tokens, mode, routing, dtype in size.comparison:
        measure(results, runner, Case("experts", preset, dtype, tokens, routing, mode))


def measure(results: Results, runner: CaseRunner, case: Case) -> None:
    """Measures one case and writes a line, with an `error` if an implementation of this package failed.

    Raises:
        DeviceLost: if the runner's GPU has become unusable.
    """
    label = {"preset": case.preset, "tokens": case.tokens, "mode": case.mode, "routing": case.routing}
    label |= {"dtype": case.dtype}
    if results.late():
        results.put(not_run=label)
        return
    with results.attempt(**label):
        _put_result(results, label, runner.measure(case))
        if runner.lost:
            raise DeviceLost(runner.lost)


def _put_result(results: Results, label: Mapping[str, object], result: Result) -> None:
    failed = {} if result.error is None else {"error": result.error}
    for name, failure in result.failures.items():
        print(f"{name} in {result.case}:\n{failure.traceback}")
    results.put(
        **label,
        ms={name: result.median(name) for name in result.times},
        rounds=max((len(times) for times in result.times.values()), default=0),
        ratios=result.ratios(),
        floors_ms=result.floors_ms,
        limit_ms=result.limit_ms,
        disagreement=result.errors,
        skipped=result.skipped,
        saved_bytes=result.saved_bytes,
        peak_bytes=result.peak_bytes,
        backends=result.backends,
        **failed,
    )
