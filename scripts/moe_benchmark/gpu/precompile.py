# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `precompile`: it fills Triton's cache for the other parts on all cores, without using the GPU."""

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator

import torch

from modeling_moe.dispatch.backends.triton import launching, tiles
from modeling_moe.dispatch.backends.triton.launching import Launch

from ..compilation import TARGETS, Call, Experts, compile_all, distinct, preset_experts, record
from . import passes
from .results import Results
from .sizes import Comparison, Shape, Size
from .sweep import alternatives, own_config, table


# launches that each process compiles before the remaining time is checked
CHUNK = 4
SCENARIOS = {"forward": ("infer",), "forward_backward": ("train", "recompute"), "decode": ("decode",)}
MODEL_SCENARIOS = ("train", "infer", "lora", "lora_infer")


def describe_gpu() -> str:
    """Returns the GPU's key in [`~moe_benchmark.compilation.TARGETS`].

    A separate process looks for the GPU, because processes that compile are forked, and a process that uses a GPU
    must not fork.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_ask)


def _ask() -> str:
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def run(results: Results, size: Size) -> None:
    """Writes a line for each kernel that does not compile, and one for all kernels."""
    start = time.time()
    target = describe_gpu()
    if target not in TARGETS:
        raise RuntimeError(f"compilation.TARGETS has no {target}: add it under Triton's name")
    jobs = os.cpu_count() or 1
    launches = list(distinct(_launches(size, TARGETS[target].family), target).values())
    results.put(target=target, jobs=jobs, kernels=len(launches), recorded_s=time.time() - start)
    done, cpu_seconds = 0, 0.0
    for first in range(0, len(launches), CHUNK * jobs):
        if results.late():
            break
        for code in compile_all(launches[first : first + CHUNK * jobs], target, jobs, analysed=False):
            done, cpu_seconds = done + 1, cpu_seconds + code.seconds
            if code.error:
                results.put(kernel=code.kernel, tile=code.tile, error=code.error)
    results.put(compiled=done, left_to_later_parts=len(launches) - done, cpu_s=cpu_seconds, wall_s=time.time() - start)


def _launches(size: Size, family: str) -> Iterator[Launch]:
    """Yields the launches of the other parts, in their order."""
    for call in calls(size):
        yield from record(call, family)
    for shape in size.swept:
        problem = passes.make(shape, "meta")
        for _, config in alternatives(shape, own_config(shape, family), size.changes):
            recorded: list[Launch] = []
            with tiles.assumed(family), launching.intercepted(recorded.append):
                passes.run(problem, config)
            yield from recorded
    for shape in size.crossover:
        for _, config in table(shape.dtype, family)[-2:]:
            for scenario in ("train", "infer"):
                yield from record(_call(shape._replace(scenario=scenario)), family, config)


def calls(size: Size) -> Iterator[Call]:
    """Returns the calls that the parts run with the table's own tiles."""
    model = size.model
    experts = Experts(
        model["hidden_size"], model["moe_intermediate_size"], model["num_experts"], model["num_experts_per_tok"]
    )
    for dtype in ("float32", size.half):
        for scenario in MODEL_SCENARIOS:
            yield Call("model", experts, size.batch[0] * size.batch[1], dtype, scenario)
        for tokens in (1, size.batch[0]):
            yield Call("model", experts, tokens, dtype, "decode")
    for experts, tokens in size.science:
        yield Call("science", experts, tokens, size.half, "train")
    shapes: Iterable[Shape | Comparison] = (*size.comparison, *size.kernels, *size.memory)
    for shape in shapes:
        scenarios = SCENARIOS[shape.mode] if isinstance(shape, Comparison) else (shape.scenario,)
        for scenario in scenarios:
            yield _call(Shape(shape.preset, shape.tokens, shape.dtype, scenario))
        yield _call(Shape(shape.preset, shape.tokens, shape.dtype, "routing"))
    for shape in size.lora:
        yield _call(shape._replace(scenario="lora"))


def _call(shape: Shape) -> Call:
    return Call(shape.preset, preset_experts(shape.preset), shape.tokens, shape.dtype, shape.scenario)
