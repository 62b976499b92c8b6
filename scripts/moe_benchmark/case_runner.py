# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Runs cases one after another, whatever they measure: a failure is recorded in its case, and the next case follows."""

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
        args: what was asked for.
        rounds: turns of each contestant, or None for as many as fit into a case's time.
        device: where.
        clock: of that device.
        stopped: why [`CaseRunner.run`] ended before its last case, or None.
        lost: the message of an error that left the GPU unusable for this process, or None.
    """

    def __init__(self, args: BenchmarkArguments):
        self.args, self.rounds = args, args.rounds
        self.device = torch.device(args.device)
        self.clock = Clock(self.device)
        self.start = time.perf_counter()
        self.stopped: str | None = None
        self.lost: str | None = None

    def contestants(self, case: Case, result: Result) -> list[Contestant]:
        """Makes the weights and inputs of `case`, and those that take turns, after each has shown that it computes the
        right thing; the others leave a note in `result`."""
        raise NotImplementedError

    def remembered(self, name: str) -> tuple[Callable[[], Any], list[torch.Tensor]] | None:
        """The forward with gradient of a contestant, and the tensors that live anyhow; None for what keeps nothing."""
        raise NotImplementedError

    def run(self, cases: Iterable[Case]) -> Iterator[Result]:
        """Measures `cases` in order, until the budget is spent or the GPU is lost: then `stopped` says so."""
        for case in cases:
            if time.perf_counter() - self.start > self.args.budget_s:
                self.stopped = f"the budget of {self.args.budget_s:g} s was spent"
            if self.stopped:
                return
            yield self.measure(case)
            if self.lost:
                self.stopped = f"the GPU was lost in {case}: {self.lost}"

    def measure(self, case: Case) -> Result:
        """Measures one case. Whatever goes wrong in it is recorded in the result.

        Raises:
            RuntimeError: if the GPU was lost in an earlier case, so that nothing could be measured in this process.
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
        result.times, failed = interleave(contestants, self.clock, self.rounds, self.args.case_s, cold)
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
        """Runs an action for a contestant, and returns whether it went well; if not there is a note in `result`."""
        try:
            action()
        except Exception as error:
            failure = Failure.of(error)
        else:
            return True
        # after the exception is gone, whose frames hold tensors
        self._drop(name, failure, result)
        return False

    def _drop(self, name: str, failure: Failure, result: Result) -> None:
        self.free()
        result.drop(name, failure, fatal=self.lost is not None)

    def free(self) -> None:
        """Gives unused memory back, and notices a GPU that is lost."""
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.lost = self.lost or Failure.of(error).message
