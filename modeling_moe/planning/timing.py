# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module turns the recorded operators into time: each takes the longer of moving its bytes and of its arithmetic.

That is the roofline model of each operator (Williams et al., 2009), plus the time to start the operator. A pass takes the
sum, because operators run one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .communication import Collective
from .devices import Device
from .recording import RunCost


# AdamW reads weight, gradient and two moments, and writes weight and moments
OPTIMIZER_PASSES = 7


class PassTime(NamedTuple):
    """The time of a pass or step.

    Attributes:
        compute: seconds of the operators of one process.
        exchange: seconds of the collectives.
        tokens: tokens that all processes together work on.
    """

    compute: float
    exchange: float
    tokens: int

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.compute + self.exchange

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all processes per second."""
        return self.tokens / self.seconds


def run_seconds(cost: RunCost, device: Device, dtype: torch.dtype) -> float:
    """Returns the time of a run on a device: the sum over operators of max(bytes / bandwidth, FLOPs / throughput).

    Args:
        cost: the run.
        device: gives the figures.
        dtype: dtype of the products.
    """
    rate = device.rate(dtype)
    busy = sum(max(each.nbytes / device.bandwidth, each.flops / rate) for each in cost.operators)
    return busy + len(cost.operators) * device.operator_seconds


def optimizer_seconds(gradients: int, device: Device) -> float:
    """Returns the time of a step of fused AdamW, which moves the bytes of the trained weights seven times."""
    return OPTIMIZER_PASSES * gradients / device.bandwidth


def exchange_seconds(found: Sequence[Collective]) -> float:
    """Returns the time of all collectives."""
    return sum(each.seconds for each in found)


def bound_by(cost: RunCost, device: Device, dtype: torch.dtype) -> str:
    """Returns whether bytes, arithmetic or starting operators takes most of a run's time."""
    rate = device.rate(dtype)
    terms = {
        "memory": sum(
            e.nbytes / device.bandwidth for e in cost.operators if e.nbytes / device.bandwidth > e.flops / rate
        ),
        "arithmetic": sum(e.flops / rate for e in cost.operators if e.nbytes / device.bandwidth <= e.flops / rate),
        "starting operators": len(cost.operators) * device.operator_seconds,
    }
    return max(terms, key=lambda name: terms[name])
