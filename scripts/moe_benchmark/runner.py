# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures experts, blocks and models: results are checked, then times and memory are measured."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from modeling_moe.dispatch import backend_of

from .arguments import BenchmarkArguments
from .case_runner import CaseRunner
from .cases import Case
from .check import FOREIGN_TOLERANCE, TOLERANCES, Call, Errors, recorded, refuse_disagreement, relative_errors
from .contestants import (
    COPY,
    DENSE,
    GRAPH,
    OURS,
    RECOMPUTE,
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
from .measure import Contestant
from .presets import PRESETS
from .results import Result
from .roofline import floor_ms, peak_of, weight_bytes
from .workloads import make_workload


class Runner(CaseRunner):
    """Measures all levels except `"lora"`, with the weights of one preset in memory at a time."""

    def __init__(self, args: BenchmarkArguments):
        super().__init__(args)
        self.loaded: tuple[str, str, str] | None = None
        self.workload: Any = None  # a Workload once a case is loaded
        register_adapters()

    def contestants(self, case: Case, result: Result) -> list[Contestant]:
        """Returns the implementations that agree with the oracle, their CUDA graphs, and the limits."""
        self._load(case)
        admitted = [self._admit(name, case, result) for name in self.args.implementations]
        implementations = [contestant for contestant in admitted if contestant is not None]
        if not implementations:
            return []
        return implementations + self._graphs(implementations, case, result) + self._limits(case, result)

    def remembered(self, name: str) -> tuple[Callable[[], Any], list[torch.Tensor]] | None:
        """Returns the forward pass of an implementation, and its inputs and parameters."""
        if name not in self.args.implementations:
            return None
        module = module_of(name, self.workload)
        return lambda: self.workload.forward(module), leaves(name, self.workload)

    def _load(self, case: Case) -> None:
        key = (case.level, case.preset, case.dtype)
        if key != self.loaded:
            self.workload = self.loaded = None
            self.free()
            self.workload = make_workload(case, self.device)
            self.loaded = key
        self.workload.prepare(case)

    def _admit(self, name: str, case: Case, result: Result) -> Contestant | None:
        """Returns a contestant whose results are correct; otherwise None, with the reason in `result`."""
        reason = skip_reason(name, case, self.device, case.torch_dtype.itemsize)
        if reason is not None:
            result.skipped[name] = reason
            return None
        contestant = implementation(name, self.workload, case.mode)
        return contestant if self.guard(name, result, partial(self._check, contestant, case, result)) else None

    def _check(self, contestant: Contestant, case: Case, result: Result) -> None:
        name = contestant.name
        contestant.prepare()
        with recorded(module_of(name, self.workload)) as calls:
            output = contestant.run()
        result.active_experts = len(calls[0].index.unique())
        if is_ours(name):
            result.backends[name] = _backend(name, calls[0], case.mode)
            result.tiles = result.tiles or tiles_of(result.backends[name], self.device)
        grads = {}
        if case.mode == "forward_backward":
            grads = dict(zip(leaves(name, self.workload), output, strict=True))
        errors = relative_errors(calls, grads)
        refuse_disagreement(errors, _tolerance(name, case), f"{name} in {case}")
        result.errors[name] = errors

    def _graphs(self, contestants: list[Contestant], case: Case, result: Result) -> list[Contestant]:
        """Returns the CUDA graphs of all implementations of this package and of transformers that can be captured."""
        graphs: list[Contestant] = []
        if self.device.type != "cuda" or not self.args.cuda_graphs or (case.level, case.mode) != ("experts", "decode"):
            return graphs
        for contestant in contestants:
            if contestant.name == "eager" or not (is_ours(contestant.name) or contestant.name in TRANSFORMERS):
                continue
            self.guard(f"{contestant.name}{GRAPH}", result, partial(self._capture, contestant, graphs, case))
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
            self.guard(DENSE, result, partial(self._add_dense, limits, case))
        return limits

    def _add_dense(self, limits: list[Contestant], case: Case) -> None:
        limits.append(dense(case, case.torch_dtype, self.device))


def _tolerance(name: str, case: Case) -> float:
    return TOLERANCES[case.torch_dtype] * (FOREIGN_TOLERANCE if is_foreign(name) else 1)


def _backend(name: str, call: Call, mode: str) -> str:
    """Returns the back end that computed a call; it may differ from the requested one if that cannot serve the call."""
    asked = None if name in (OURS, RECOMPUTE) else name.removeprefix(f"{OURS}_")
    with torch.set_grad_enabled(mode == "forward_backward"):
        return backend_of(call.module, call.x.detach(), call.index, asked)


def tiles_of(backend: str, device: torch.device) -> str:
    """Returns the family of the Triton kernels' tiles; empty for other back ends, which run without Triton."""
    if not backend.startswith("triton"):
        return ""
    from modeling_moe.dispatch.backends.triton import tiles

    return tiles.family_of(device) or ""
