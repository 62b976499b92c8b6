# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures the time of a call on the GPU, and of each kernel that the call launches."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from modeling_moe.dispatch.backends.triton import launching


def _warm(rounds: int) -> int:
    """Runs the warm-up calls: the first one loads or compiles kernels, and the clocks need some time to rise."""
    return max(1, rounds // 4)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start, end


def median_ms(call: Callable[[], Any], rounds: int) -> float:
    """Returns the median time of a call in ms.

    Args:
        call: function to time; calls follow each other without waiting, so that the GPU never idles for the host.
        rounds: number of timed calls; a quarter as many warm-up calls come before them.
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
    """Holds a launch of a kernel within a call, and the median of its times in ms."""

    launch: launching.Launch
    ms: float


def launch_times(call: Callable[[], Any], rounds: int) -> list[LaunchTime]:
    """Times each Triton launch of a call, in the order of the launches.

    Args:
        call: function that launches equal kernels each time.
        rounds: number of timed calls; a quarter as many warm-up calls come before them.

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
        raise RuntimeError(
            f"{rounds} equal calls made {len(log)} launches, which is not an equal number for each call"
        )
    times = []
    for number in range(count):
        turns = log[number::count]
        median = statistics.median(start.elapsed_time(end) for _, start, end in turns)
        times.append(LaunchTime(turns[0][0], median))
    return times
