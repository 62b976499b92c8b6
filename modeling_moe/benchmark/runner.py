# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Runs the cases: check, then time, then count memory."""

import gc
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from ..dispatch import backend_of
from .arguments import BenchmarkArguments
from .cases import Case
from .check import (
    FOREIGN_TOLERANCE,
    TOLERANCES,
    Call,
    Disagreement,
    Errors,
    recorded,
    refuse_disagreement,
    relative_errors,
)
from .contestants import (
    COPY,
    DENSE,
    GRAPH,
    OURS,
    TRANSFORMERS,
    captured,
    dense,
    implementation,
    is_foreign,
    is_ours,
    leaves,
    module_of,
    register_adapters,
    skip_reason,
)
from .measure import Clock, Contestant, interleave, is_out_of_memory, peak_bytes, saved_bytes
from .presets import PRESETS
from .results import Result
from .roofline import floor_ms, peak_of, weight_bytes
from .workloads import make_workload


class Runner:
    """Measures cases on one device, with the weights of one preset in memory at a time."""

    def __init__(self, args: BenchmarkArguments):
        self.args = args
        self.device = torch.device(args.device)
        self.clock = Clock(self.device)
        self.start = time.perf_counter()
        self.loaded: tuple[str, str, str] | None = None
        self.workload: Any = None  # a Workload once a case is loaded
        register_adapters()

    def run(self, cases: Iterable[Case]) -> tuple[list[Result], list[Case]]:
        """Measures `cases` in order, until the budget is spent.

        Returns:
            The results, and the cases that there was no time for.

        Raises:
            Disagreement: if an implementation fails or disagrees with the oracle, unless it is foreign.
        """
        results, not_run = [], []
        for case in cases:
            if time.perf_counter() - self.start > self.args.budget_s:
                not_run.append(case)
            else:
                results.append(self.measure(case))
        return results, not_run

    def measure(self, case: Case) -> Result:
        """Measures one case."""
        result = Result(case, copied_bytes=self.clock.copied_bytes)
        contestants: list[Contestant] = []
        try:
            self._load(case)
            for name in self.args.implementations:
                contestant = self._admit(name, case, result)
                if contestant is not None:
                    contestants.append(contestant)
            implementations = list(contestants)
            contestants += self._graphs(implementations, case, result)
            contestants += self._limits(case, result)
            seconds, cold = self.args.case_s, case.mode == "decode"
            result.times, failed = interleave(contestants, self.clock, self.args.rounds, seconds, cold)
            result.skipped |= failed
            for contestant in implementations:
                if contestant.name in result.times:
                    self._guard(contestant.name, case, result, partial(self._memory, contestant, case, result))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            result.skipped["all"] = "out of memory"
        contestants.clear()
        self._free()
        return result

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, case: Case) -> None:
        key = (case.level, case.preset, case.dtype)
        if key != self.loaded:
            self.workload = self.loaded = None
            self._free()
            self.workload = make_workload(case, self.device)
            self.loaded = key
        self.workload.prepare(case)

    def _guard(self, name: str, case: Case, result: Result, action: Callable[[], object]) -> bool:
        """Runs an action for a contestant.

        Returns:
            Whether it went well; if not there is a note in `result`.

        Raises:
            Disagreement: if it failed for want of more than memory, and is not foreign.
        """
        try:
            action()
        except Exception as error:
            if is_out_of_memory(error):
                result.skipped[name] = "out of memory"
            elif is_foreign(name):
                result.skipped[name] = _first_line(error)
            elif isinstance(error, Disagreement):
                raise
            else:
                raise Disagreement(f"{name} failed in {case}: {_first_line(error)}") from error
        if name in result.skipped:
            self._free()
        return name not in result.skipped

    def _admit(self, name: str, case: Case, result: Result) -> Contestant | None:
        """A contestant that has shown that it computes the right thing, or None with a note in `result`."""
        reason = skip_reason(name, case, self.device, case.torch_dtype.itemsize)
        if reason is not None:
            result.skipped[name] = reason
            return None
        contestant = implementation(name, self.workload, case.mode)
        return contestant if self._guard(name, case, result, partial(self._check, contestant, case, result)) else None

    def _check(self, contestant: Contestant, case: Case, result: Result) -> None:
        name = contestant.name
        contestant.prepare()
        with recorded(module_of(name, self.workload)) as calls:
            output = contestant.run()
        grads = {}
        if case.mode == "forward_backward":
            grads = dict(zip(leaves(name, self.workload), output, strict=True))
        errors = relative_errors(calls, grads)
        refuse_disagreement(errors, _tolerance(name, case), f"{name} in {case}")
        result.errors[name] = errors
        if is_ours(name):
            result.backends[name] = _backend(name, calls[0], case.mode)
        result.active_experts = len(calls[0].index.unique())

    def _graphs(self, contestants: list[Contestant], case: Case, result: Result) -> list[Contestant]:
        """CUDA graphs of ours and of transformers' implementations, those that can be captured."""
        graphs: list[Contestant] = []
        if self.device.type != "cuda" or not self.args.cuda_graphs or (case.level, case.mode) != ("experts", "decode"):
            return graphs
        for contestant in contestants:
            if contestant.name == "eager" or not (is_ours(contestant.name) or contestant.name in TRANSFORMERS):
                continue
            name = f"{contestant.name}{GRAPH}"
            self._guard(name, case, result, partial(self._capture, contestant, graphs, case))
        return graphs

    def _capture(self, contestant: Contestant, graphs: list[Contestant], case: Case) -> None:
        graph = captured(contestant)
        contestant.prepare()
        errors = Errors()
        errors.add("output", graph.run(), contestant.run())
        refuse_disagreement(errors.relative(), _tolerance(contestant.name, case), f"{graph.name} in {case}")
        graphs.append(graph)

    def _limits(self, case: Case, result: Result) -> list[Contestant]:
        preset, dtype = PRESETS[case.preset], case.torch_dtype
        active = result.active_experts
        result.weight_bytes = weight_bytes(preset, active, case.mode, dtype.itemsize)
        if self.device.type == "cuda" and case.level == "experts" and dtype.itemsize == 2:
            peak = peak_of(torch.cuda.get_device_name(self.device))
            if peak is not None:
                result.floors_ms = floor_ms(preset, case.tokens, active, case.mode, dtype.itemsize, peak)
        limits = [Contestant(COPY, self.clock.copy)]
        if case.level != "model" and case.mode != "decode":
            self._guard(DENSE, case, result, partial(self._add_dense, limits, case))
        return limits

    def _add_dense(self, limits: list[Contestant], case: Case) -> None:
        limits.append(dense(case, case.torch_dtype, self.device))

    def _memory(self, contestant: Contestant, case: Case, result: Result) -> None:
        name = contestant.name
        contestant.prepare()
        if case.mode == "forward_backward":
            alive, module = leaves(name, self.workload), module_of(name, self.workload)
            result.saved_bytes[name] = saved_bytes(lambda: self.workload.forward(module), alive)
        if self.device.type == "cuda":
            contestant.prepare()
            result.peak_bytes[name] = peak_bytes(contestant.run, self.device)


def _tolerance(name: str, case: Case) -> float:
    return TOLERANCES[case.torch_dtype] * (FOREIGN_TOLERANCE if is_foreign(name) else 1)


def _backend(name: str, call: Call, mode: str) -> str:
    if name != OURS:
        return name.removeprefix("moe_")
    with torch.set_grad_enabled(mode == "forward_backward"):
        return backend_of(call.module, call.x.detach(), call.index)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
