# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts what the processes exchange in a step, and the time by the alpha-beta model.

A collective among N processes takes `alpha * log2(N) + bytes / bandwidth`. Exchange and computation count as one after the
other, which is an upper bound.

# T tokens of a process, K experts per token, H hidden size, N processes of a group
"""

import math
from typing import NamedTuple

from .devices import Device
from .memory import whole_bytes
from .parallelism import Parallelism, rounds
from .sizes import Sizes


# bytes of a bucket of gradients in DDP
BUCKET = 25 * 2**20


class Collective(NamedTuple):
    """One kind of exchange in a step.

    Attributes:
        name: what is exchanged.
        calls: number of collectives.
        nbytes: bytes that one process sends in all of them.
        seconds: time of all of them.
    """

    name: str
    calls: int
    nbytes: int
    seconds: float


def all_to_all_bytes(tokens: int, top_k: int, hidden_size: int, itemsize: int, ep_size: int) -> int:
    """Returns the bytes that a process sends in one all-to-all: its T K rows of H numbers, without its own share.

    That is T K H (N - 1) / N numbers, if the load of the experts is balanced (GShard, arXiv:2006.16668).
    """
    return tokens * top_k * hidden_size * itemsize * (ep_size - 1) // ep_size


def _beside_own(nbytes: float, size: int) -> float:
    """Returns the part of some bytes, spread evenly over `size` processes, that one process does not hold itself."""
    return nbytes * (size - 1) / size


def collectives(
    sizes: Sizes, parallelism: Parallelism, device: Device, tokens: int, itemsize: int, training: bool
) -> list[Collective]:
    """Returns what one process exchanges in a pass (inference) or in a step (training).

    Args:
        sizes: parameters of the model.
        parallelism: how the model is split.
        device: gives latency and bandwidth of the links.
        tokens: tokens T of one process.
        itemsize: bytes of a number that is exchanged.
        training: whether backward follows.
    """
    passes, found = (2 if training else 1), []

    def add(name: str, size: int, calls: int, nbytes: float) -> None:
        if size > 1 and calls:
            seconds = calls * device.link_latency * rounds(size) + nbytes / device.link_bandwidth
            found.append(Collective(name, calls, round(nbytes), seconds))

    size, shards = parallelism.fsdp_size, parallelism.expert_shards
    if training:
        replicas = parallelism.batches if size == 1 else parallelism.ddp_size
        experts, others = whole_bytes(sizes, parallelism, trained=True)
        experts, others = experts / shards, others / size
        sent = _beside_own(experts, parallelism.ddp_size) + _beside_own(others, replicas)
        add("all-reduce of gradients (DDP)", replicas, math.ceil((experts + others) / BUCKET), 2 * sent)
    experts, others = whole_bytes(sizes, parallelism, trained=False)
    gathered = passes * (_beside_own(experts, shards) + _beside_own(others, size))
    add("all-gather of weights (FSDP)", size, passes * (sizes.layers + 1), gathered)
    if training:
        experts, others = whole_bytes(sizes, parallelism, trained=True)
        scattered = _beside_own(experts, shards) + _beside_own(others, size)
        add("reduce-scatter of gradients (FSDP)", size, sizes.layers + 1, scattered)
    size = parallelism.tp_size
    calls = 2 * passes * sizes.layers
    row = tokens * sizes.hidden_size * itemsize
    add("all-reduce of activations (TP)", size, calls, calls * 2 * row * (size - 1) / size)
    size = parallelism.ep_size
    calls = 2 * passes * sizes.sparse_layers
    each = all_to_all_bytes(tokens, sizes.top_k or 1, sizes.hidden_size, itemsize, size)
    add("all-to-all of tokens (EP)", size, calls, calls * each)
    return found
