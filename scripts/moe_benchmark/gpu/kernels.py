# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `kernels`: it measures time and TFLOP/s of each launch of a pass, and of the whole pass."""

from collections.abc import Iterable
from typing import Any

from modeling_moe.dispatch.backends.triton.launching import Launch

from . import passes
from .results import Results, free
from .sizes import Size
from .timing import LaunchTime, launch_times, median_ms


TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


def run(results: Results, size: Size) -> None:
    """Writes, for each pass of `size.kernels`, a line for every launch in order, and one for the whole pass."""
    for shape in size.kernels:
        if results.late():
            results.put(not_run=shape._asdict())
            continue
        with results.attempt(**shape._asdict()):
            problem = passes.make(shape)
            times = launch_times(lambda problem=problem: passes.run(problem), size.rounds)
            whole = median_ms(lambda problem=problem: passes.run(problem), size.rounds)
            for number, (launch, ms) in enumerate(times):
                work = flops(launch, problem.slots)
                rate = {"tflops": work / ms / 1e9} if work else {}
                results.put(**shape._asdict(), launch=number, kernel=launch.name, ms=ms, **rate, tile=tile_of(launch))
            work, products = total(times, problem.slots)
            rate = {"tflops": work / whole / 1e9} if work else {}
            results.put(**shape._asdict(), whole_ms=whole, launches=len(times), products_ms=products, **rate)
            del problem
        free()


def named_arguments(launch: Launch) -> dict[str, Any]:
    """Arguments and constants of a launch by their names in the kernel."""
    return launch.arguments | launch.options


def tile_of(launch: Launch) -> list[int | None]:
    """Returns the constant `TILE` of a launch, or None if the kernel has none."""
    return [launch.options.get(name) for name in TILE]


def flops(launch: Launch, slots: int) -> int:
    """Returns the floating-point operations of a launch's matrix product over `rows` rows; 0 for a kernel without
    a product.
    """
    values = named_arguments(launch)
    if launch.name == "project_up":
        columns = values["inner"] * (1 if values["LAYOUT"] == "plain" else 2)
        return 2 * slots * values["hidden"] * columns
    if launch.name in ("multiply", "multiply_persistent"):
        return 2 * slots * values["n"] * values["k"]
    if launch.name == "gate_backward":
        return 2 * slots * values["hidden"] * values["inner"]
    if launch.name == "weight_gradient":
        return 2 * slots * values["num_m"] * values["num_n"]
    return 0


def total(times: Iterable[LaunchTime], slots: int) -> tuple[int, float]:
    """Returns the floating-point operations of all products among some launches, and their time in ms."""
    products = [(work, ms) for launch, ms in times if (work := flops(launch, slots))]
    return sum(work for work, _ in products), sum(ms for _, ms in products)
