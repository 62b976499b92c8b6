# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says what to change when a plan does not fit: each change alone, the cheapest first, with the memory left."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..utils.sizes import size_text
from .memory import Memory
from .simulation import Method, Recompute
from .sizes import Sizes


class Change(NamedTuple):
    """A change to a plan that does not fit.

    Attributes:
        text: what to change, with the flag.
        total: bytes of one process after the change.
        fits: whether this is enough.
    """

    text: str
    total: int
    fits: bool


class Choice(NamedTuple):
    """What a plan of a training run is made for.

    Attributes:
        method: what trains.
        recompute: what backward computes again.
        dtype: dtype of the weights.
        fsdp_size: processes over which weights are split.
    """

    method: Method
    recompute: Recompute
    dtype: torch.dtype
    fsdp_size: int


def training_changes(
    choice: Choice, needs: Callable[[Choice], Memory], memory: float, four_bits: bool = True
) -> list[Change]:
    """Returns the changes that lessen the memory of a training run, from the cheapest to the dearest.

    The list ends with the first change that is enough.

    Args:
        choice: the plan that does not fit.
        needs: returns the memory of another choice.
        memory: bytes of the device.
        four_bits: whether the model has experts that can be held in 4 bits.
    """
    tries: list[tuple[str, Choice]] = []
    small = choice
    if choice.dtype.itemsize > 2:
        small = small._replace(dtype=torch.bfloat16)
        tries.append(("weights in 16 bits: --dtype bfloat16", small))
    if choice.recompute != "layers":
        small = small._replace(recompute="layers")
        tries.append(("each layer computed again in backward: --recompute layers", small))
    if choice.method == "full":
        small = small._replace(method="lora")
        tries.append(("LoRA in the place of all weights: --train lora", small))
    if choice.method in ("full", "lora") and four_bits:
        small = small._replace(method="qlora")
        tries.append(("experts in 4 bits: --train qlora", small))
    changes: list[Change] = []
    for text, tried in tries:
        total = needs(tried).total
        changes.append(Change(_beside(changes, text), total, total <= memory))
        if total <= memory:
            return changes
    return [*changes, _more_devices(small, needs, memory, changes)]


def _beside(changes: list[Change], text: str) -> str:
    """Returns the text of a change, which begins with "and" if others stand before it."""
    return f"and {text}" if changes else text


def _more_devices(choice: Choice, needs: Callable[[Choice], Memory], memory: float, changes: list[Change]) -> Change:
    """Returns the least power of two of devices over which FSDP splits the weights so that they fit."""
    for power in range(1, 13):
        split = choice._replace(fsdp_size=2**power * choice.fsdp_size)
        total = needs(split).total
        if total <= memory:
            by = " and fully_shard in a loop of your own" if choice.method == "qlora" else ""
            return Change(
                _beside(changes, f"{split.fsdp_size} devices: --fsdp_size {split.fsdp_size}{by}"), total, True
            )
    text = "shorter sequences: --sequence_length; no number of devices is enough"
    return Change(_beside(changes, text), needs(choice).total, False)


def inference_changes(sizes: Sizes, memory_now: Memory, dtype: torch.dtype, memory: float) -> list[Change]:
    """Returns the changes that lessen the memory of a generation, from the cheapest to the dearest.

    Args:
        sizes: parameters of the model.
        memory_now: memory of the plan that does not fit.
        dtype: dtype of the weights.
        memory: bytes of the device.
    """
    changes, total = [], memory_now.total
    if dtype.itemsize > 2:
        total = total * 2 // dtype.itemsize
        changes.append(Change("weights in 16 bits: --dtype bfloat16", total, total <= memory))
    experts = sizes.groups["routed experts"].nbytes * 2 // max(dtype.itemsize, 2) if sizes.num_experts else 0
    if experts and sizes.top_k and total > memory:
        least = total - experts + experts * sizes.top_k // sizes.num_experts
        if fits := least <= memory:
            budget = size_text(int(memory) - (total - experts), up=False).replace(" ", "")
            text = f"experts read when a token needs them: moe generate --budget {budget}"
        else:
            text = "experts read when a token needs them, the least cache: moe generate --budget"
        changes.append(Change(text, int(memory) if fits else least, fits))
    if total > memory:
        devices = 2 ** math.ceil(math.log2(max(total / memory, 1.0)))
        while total / devices > memory:
            devices *= 2
        text = f"{devices} devices that divide the layers: --tp_size {devices}"
        changes.append(Change(text, total // devices, True))
    return changes
