# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs cases one after another; a failure is recorded in the result of its case, and the next case runs."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from .arguments import BenchmarkArguments
from .cases import Case
from .measure import Clock, Contestant, Failure, interleave, peak_bytes, saved_bytes
from .results import Result


class CaseRunner:
    """Measures cases on one device.

    Attributes:
        args: arguments of the benchmark.
        rounds: number of rounds; None for as many as fit into a case's time.
        device: device of all tensors.
        clock: clock of the device.
        stopped: why [`CaseRunner.run`] ended before the last case; None if it did not.
        lost: message of an error that left the GPU unusable for this process; None without one.
    """

    def __init__(self, args: BenchmarkArguments):
        self.args, self.rounds = args, args.rounds
        self.device = torch.device(args.device)
        self.clock = Clock(self.device)
        self.start = time.perf_counter()
        self.stopped: str | None = None
        self.lost: str | None = None

    def contestants(self, case: Case, result: Result) -> list[Contestant]:
        """Makes weights and inputs of `case`, and returns the contestants whose results are correct.

        Other contestants are recorded as skipped or failed in `result`.
        """
        raise NotImplementedError

    def remembered(self, name: str) -> tuple[Callable[[], Any], list[torch.Tensor]] | None:
        """Returns a contestant's forward pass with gradients, and the tensors that exist without it.

        The result is None for a contestant that saves nothing for backward.
        """
        raise NotImplementedError

    def run(self, cases: Iterable[Case]) -> Iterator[Result]:
        """Measures `cases` in order until the budget is spent or the GPU is lost; `stopped` then holds the reason."""
        for case in cases:
            if time.perf_counter() - self.start > self.args.seconds_of_run:
                self.stopped = f"the budget of {self.args.seconds_of_run:g} s was spent"
            if self.stopped:
                return
            yield self.measure(case)
            if self.lost:
                self.stopped = f"the GPU was lost in {case}: {self.lost}"

    def measure(self, case: Case) -> Result:
        """Measures one case and records every failure in the result.

        Raises:
            RuntimeError: if the GPU was lost in an earlier case, so that nothing can be measured in this process.
        """
        if self.lost:
            raise RuntimeError(f"the GPU was lost in an earlier case, start another process: {self.lost}")
        result = Result(case, copied_bytes=self.clock.copied_bytes)
        self.guard("all", result, partial(self._measure, case, result))
        self.free()
        return result

    def _measure(self, case: Case, result: Result) -> None:
        contestants = self.contestants(case, result)
        cold = case.mode == "decode"
        result.times, failed = interleave(contestants, self.clock, self.rounds, self.args.seconds_of_case, cold)
        for name, failure in failed.items():
            self._drop(name, failure, result)
        for contestant in contestants:
            if contestant.name in result.times:
                self.guard(contestant.name, result, partial(self._memory, contestant, case, result))

    def _memory(self, contestant: Contestant, case: Case, result: Result) -> None:
        remembered = self.remembered(contestant.name)
        if remembered is None:
            return
        if case.mode == "forward_backward":
            contestant.prepare()
            result.saved_bytes[contestant.name] = saved_bytes(*remembered)
        if self.device.type == "cuda":
            contestant.prepare()
            result.peak_bytes[contestant.name] = peak_bytes(contestant.run, self.device)

    def guard(self, name: str, result: Result, action: Callable[[], object]) -> bool:
        """Runs an action for a contestant; returns whether it succeeded, and records a failure in `result`."""
        try:
            action()
        except Exception as error:
            failure = Failure.of(error)
        else:
            return True
        # here the exception is gone, whose frames held tensors
        self._drop(name, failure, result)
        return False

    def _drop(self, name: str, failure: Failure, result: Result) -> None:
        self.free()
        result.drop(name, failure, fatal=self.lost is not None)

    def free(self) -> None:
        """Frees unused memory, and detects a lost GPU."""
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.lost = self.lost or Failure.of(error).message
