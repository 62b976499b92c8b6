# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module computes the smallest possible time of a shape: arithmetic over the peak rate, or bytes over bandwidth.

# T tokens, H hidden, I expert width, E experts, K experts per token. Each product reads and writes its operands once.
"""

from typing import NamedTuple

from .presets import Preset


class Peak(NamedTuple):
    """Holds the peak that the maker states: dense 16-bit TFLOP/s, and TB/s."""

    tera_flops: float
    tera_bytes: float


# the first key that is a part of the device's name applies
PEAKS = {"H200": Peak(989.0, 4.8), "H100": Peak(989.0, 3.35)}


def peak_of(device_name: str) -> Peak | None:
    """Returns the stated peak of a GPU, or None if it is not in `PEAKS`."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def floor_ms(preset: Preset, tokens: int, active: int, mode: str, element_size: int, peak: Peak) -> dict[str, float]:
    """Returns the smallest possible time in milliseconds.

    Args:
        preset: the shape.
        tokens: number of tokens T.
        active: number of experts with any token.
        mode: mode of a [`~moe_benchmark.cases.Case`].
        element_size: size of an element in bytes.
        peak: peak of the device.

    Returns:
        `"compute"`, `"memory"`, and `"floor"`: the sum over the passes of the larger of the two.
    """
    hidden, width = preset.per_token * preset.hidden, preset.per_token * preset.intermediate
    product = 2 * preset.per_token * preset.expert_elements * tokens
    active_bytes = active * preset.expert_elements * element_size
    passes = [(product, element_size * (3 * hidden + 4 * width + preset.hidden) * tokens + active_bytes)]
    if mode == "forward_backward":
        moved = element_size * (5 * hidden + 10 * width + preset.hidden) * tokens
        gradients = (
            preset.experts * preset.expert_elements * element_size
        )  # gradients of experts without tokens are written too
        passes.append((2 * product, moved + active_bytes + gradients))
    compute = [1e3 * flops / (peak.tera_flops * 1e12) for flops, _ in passes]
    memory = [1e3 * moved / (peak.tera_bytes * 1e12) for _, moved in passes]
    floor = sum(max(pair) for pair in zip(compute, memory, strict=True))
    return {"compute": sum(compute), "memory": sum(memory), "floor": floor}


def weight_bytes(preset: Preset, active: int, mode: str, element_size: int) -> int:
    """Returns the bytes of expert weights to move: active ones are read once a pass, all gradients are written."""
    read = active * preset.expert_elements * element_size
    written = preset.experts * preset.expert_elements * element_size
    return 2 * read + written if mode == "forward_backward" else read
