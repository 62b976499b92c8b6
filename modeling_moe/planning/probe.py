# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures what a plan needs to know of this machine: a matrix product, a stream, and a small operator."""

import os
import time
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from .devices import Device
from .simulation import simulated_model, without_deprecations


# rows and columns of the product; bytes of the stream, more than caches hold, and columns of the matrix; rounds, of which
# the median counts
PRODUCT, STREAM, WIDTH, ROUNDS = 1024, 1 << 27, 1024, 5


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
    # a matrix met by one token, as in decoding, which reads the memory and computes almost nothing
    matrix = torch.zeros(STREAM // dtype.itemsize // WIDTH, WIDTH, dtype=dtype, device=device)
    token = torch.zeros(1, WIDTH, dtype=dtype, device=device)
    stream = median_seconds(lambda: torch.nn.functional.linear(token, matrix), device)
    flops = {}
    for each in dtypes:
        left, right = (torch.randn(PRODUCT, PRODUCT, device=device).to(each) for _ in range(2))
        flops[each] = 2 * PRODUCT**3 / median_seconds(lambda a=left, b=right: a @ b, device)
    return Device(
        name=f"this machine ({device.type}, {torch.get_num_threads()} threads)",
        memory=_memory(device),
        bandwidth=STREAM / stream,
        flops=flops,
        link_bandwidth=1e9,
        link_latency=50e-6,
        operator_seconds=_operator_seconds(device),
        assumed=("link_bandwidth", "link_latency"),
        source="measured",
    )


@torch.no_grad()
def _operator_seconds(device: torch.device) -> float:
    """Returns the time that Python, transformers and torch need for one operator: that of a tiny model's token."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    simulated = simulated_model(config, torch.float32)
    operators = len(simulated.decode(1, simulated.prefill(1, 2).cache).operators)
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    one = ids[:, :1]
    with without_deprecations():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        return median_seconds(lambda: model(input_ids=one, past_key_values=cache, use_cache=True), device) / operators


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
