# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The least that a shape can cost: arithmetic over the peak rate, or bytes over bandwidth.

# T tokens, H hidden, I expert width, E experts, K per token. Each matrix product reads and writes its operands once.
"""

from typing import NamedTuple

from .presets import Preset


class Peak(NamedTuple):
    """What the maker states: dense 16-bit TFLOP/s and TB/s."""

    tera_flops: float
    tera_bytes: float


# by a part of the device's name, the first that fits
PEAKS = {"H200": Peak(989.0, 4.8), "H100": Peak(989.0, 3.35)}


def peak_of(device_name: str) -> Peak | None:
    """Stated peak of a GPU, or None if it is not in `PEAKS`."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def floor_ms(preset: Preset, tokens: int, active: int, mode: str, element_size: int, peak: Peak) -> dict[str, float]:
    """Least time in ms.

    Args:
        preset: the shape.
        tokens: T.
        active: experts that have any token.
        mode: as in [`~moe_benchmark.cases.Case`].
        element_size: bytes of an element.
        peak: of the device.

    Returns:
        `"compute"`, `"memory"`, and `"floor"`: the sum over the passes of the larger of the two.
    """
    hidden, width = preset.per_token * preset.hidden, preset.per_token * preset.intermediate
    product = 2 * preset.per_token * preset.expert_elements * tokens
    active_bytes = active * preset.expert_elements * element_size
    passes = [(product, element_size * (3 * hidden + 4 * width + preset.hidden) * tokens + active_bytes)]
    if mode == "forward_backward":
        moved = element_size * (5 * hidden + 10 * width + preset.hidden) * tokens
        gradients = preset.experts * preset.expert_elements * element_size  # those of idle experts are written too
        passes.append((2 * product, moved + active_bytes + gradients))
    compute = [1e3 * flops / (peak.tera_flops * 1e12) for flops, _ in passes]
    memory = [1e3 * moved / (peak.tera_bytes * 1e12) for _, moved in passes]
    floor = sum(max(pair) for pair in zip(compute, memory, strict=True))
    return {"compute": sum(compute), "memory": sum(memory), "floor": floor}


def weight_bytes(preset: Preset, active: int, mode: str, element_size: int) -> int:
    """Bytes of expert weights that must move: the active ones read once a pass, all gradients written."""
    read = active * preset.expert_elements * element_size
    written = preset.experts * preset.expert_elements * element_size
    return 2 * read + written if mode == "forward_backward" else read
