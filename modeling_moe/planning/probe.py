# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures what a plan needs to know of this machine: a matrix product, a stream, and a small operator."""

import os
import time
from collections.abc import Callable, Sequence

import torch

from .devices import Device


# rows and columns of the product; bytes of the stream, more than caches hold; rounds, of which the median counts
PRODUCT, STREAM, ROUNDS = 1024, 1 << 27, 5


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Returns the median time of a function, after one call that does not count.

    Args:
        work: what is timed.
        device: device of the work; an accelerator is waited for.
        rounds: number of calls that count.
    """
    clock = clock_of(device)
    times = []
    for _ in range(rounds + 1):
        start = clock()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(clock() - start)
    return sorted(times[1:])[rounds // 2]


def clock_of(device: torch.device) -> Callable[[], float]:
    """Returns the clock of a measurement: with one thread the processor time, which other programs disturb less."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def measure_device(dtypes: Sequence[torch.dtype], device: torch.device | None = None) -> Device:
    """Measures this machine in about a second.

    Args:
        dtypes: dtypes of the products; the stream has the first one.
        device: device to measure; the accelerator if there is one, else the CPU. No accelerator was ever measured.

    Returns:
        The device; figures of the links are those of `CPU` in configuration/devices.yaml, and assumed.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = dtypes[0]
    source = torch.zeros(STREAM // dtype.itemsize, dtype=dtype, device=device)
    small = torch.zeros(8, dtype=dtype, device=device)

    def start_operators() -> None:
        for _ in range(200):
            torch.nn.functional.silu(small)

    # memory that was used before, as most of a model's is: the first touch of a page takes longer
    target = torch.empty_like(source)
    stream = median_seconds(lambda: torch.add(source, 1, out=target), device)
    flops = {}
    for each in dtypes:
        left, right = (torch.randn(PRODUCT, PRODUCT, device=device).to(each) for _ in range(2))
        flops[each] = 2 * PRODUCT**3 / median_seconds(lambda a=left, b=right: a @ b, device)
    return Device(
        name=f"this machine ({device.type}, {torch.get_num_threads()} threads)",
        memory=_memory(device),
        bandwidth=2 * STREAM / stream,
        flops=flops,
        link_bandwidth=1e9,
        link_latency=50e-6,
        operator_seconds=median_seconds(start_operators, device) / 200,
        assumed=("link_bandwidth", "link_latency"),
        source="measured",
    )


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
