# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Time of a call on the GPU, and of each kernel that the call launches."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from modeling_moe.dispatch.backends.triton import launching


def _warm(rounds: int) -> int:
    """Calls before those that count: the first one loads or compiles kernels, and the clocks need some time to rise."""
    return max(1, rounds // 4)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start, end


def median_ms(call: Callable[[], Any], rounds: int) -> float:
    """Median time in ms of a call.

    Args:
        call: what is timed; calls follow each other without waiting, so that the GPU never idles for the host.
        rounds: calls that count; a quarter as many come before them.
    """
    for _ in range(_warm(rounds)):
        call()
    pairs = [_events() for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


class LaunchTime(NamedTuple):
    """A kernel's launch within a call, and the median of its times in ms."""

    launch: launching.Launch
    ms: float


def launch_times(call: Callable[[], Any], rounds: int) -> list[LaunchTime]:
    """Times each Triton launch of a call, in the order of the launches.

    Args:
        call: launches the same kernels each time.
        rounds: calls that count; a quarter as many come before them.

    Raises:
        RuntimeError: if the calls launch different numbers of kernels.
    """
    log: list[tuple[launching.Launch, Any, Any]] = []

    def timed(launch: launching.Launch) -> None:
        start, end = _events()
        start.record()
        launch.run()
        end.record()
        log.append((launch, start, end))

    for _ in range(_warm(rounds)):
        call()
    with launching.intercepted(timed):
        for _ in range(rounds):
            call()
    torch.cuda.synchronize()
    count, rest = divmod(len(log), rounds)
    if rest:
        raise RuntimeError(f"{rounds} equal calls made {len(log)} launches, which cannot be an equal number each")
    times = []
    for number in range(count):
        turns = log[number::count]
        median = statistics.median(start.elapsed_time(end) for _, start, end in turns)
        times.append(LaunchTime(turns[0][0], median))
    return times
