# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module adds up the memory of one process: weights, gradients, optimizer, activations, and copies for exchange.

Python, torch and the device's context come on top; they do not depend on the model.
"""

from dataclasses import dataclass

from .parallelism import Parallelism
from .recording import RunCost
from .sizes import EXPERTS, Sizes


# AdamW keeps two moments in the dtype of the weights, and the number of steps in fp32 for each tensor
MOMENTS, STEP_BYTES = 2, 4
# FSDP holds the layer that computes and the next one, which it gathers meanwhile
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights: weights and buffers.
        gradients: gradients of the weights that train.
        optimizer: state of AdamW.
        activations: all other tensors of a pass at the worst moment, the cache of a generation included.
        exchange: copies of weights and gradients that DDP or FSDP holds to exchange them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    exchange: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.exchange


def weight_bytes(sizes: Sizes, parallelism: Parallelism) -> int:
    """Returns the bytes of weights and buffers of one process."""
    return _part(sizes, parallelism, trained=False) + sizes.buffers


def gradient_bytes(sizes: Sizes, parallelism: Parallelism) -> int:
    """Returns the bytes of the gradients of one process."""
    return _part(sizes, parallelism, trained=True)


def optimizer_bytes(sizes: Sizes, parallelism: Parallelism) -> int:
    """Returns the bytes of AdamW's state of one process."""
    tensors = sum(group.trained_tensors for group in sizes.groups.values())
    return MOMENTS * gradient_bytes(sizes, parallelism) + STEP_BYTES * tensors


def training_memory(sizes: Sizes, cost: RunCost, parallelism: Parallelism, in_4_bits: bool = False) -> Memory:
    """Returns the memory of one process that trains.

    With one process this is the largest sum over the time of a step. With several it is the sum of the largest parts,
    since gradients are split or exchanged while activations are freed. Tensor parallelism divides the weights that the
    model's plan names; activations count as whole, which is an upper bound.

    Args:
        sizes: parameters of the model.
        cost: forward and backward of one micro-batch.
        parallelism: how the model is split.
        in_4_bits: whether experts are in 4 bits, so that a layer's experts are dequantised while they compute.
    """
    gradients = gradient_bytes(sizes, parallelism)
    dequantised = max(sizes.expert_layer, sizes.attention_layer) if in_4_bits else 0
    if parallelism.processes == 1:
        activations = max(cost.peak + dequantised - gradients, 0)
    else:
        activations = cost.activation_peak + dequantised
    return Memory(
        weights=weight_bytes(sizes, parallelism),
        gradients=gradients,
        optimizer=optimizer_bytes(sizes, parallelism),
        activations=activations,
        exchange=_exchange_bytes(sizes, parallelism, gradients),
    )


def inference_memory(sizes: Sizes, cost: RunCost, parallelism: Parallelism) -> Memory:
    """Returns the memory of one process that generates; the cache is part of the activations.

    Args:
        sizes: parameters of the model.
        cost: the prompt's pass.
        parallelism: how the model is split.
    """
    return Memory(weight_bytes(sizes, parallelism), 0, 0, cost.peak, _exchange_bytes(sizes, parallelism, 0))


def whole_bytes(sizes: Sizes, parallelism: Parallelism, trained: bool) -> tuple[float, float]:
    """Returns the bytes of one process's routed experts and other weights, as they are while FSDP has gathered them.

    Args:
        sizes: parameters of the model.
        parallelism: how the model is split.
        trained: whether to count the weights that train alone.
    """
    experts = others = 0.0
    for name, group in sizes.groups.items():
        nbytes = group.trained_bytes if trained else group.nbytes
        if name == EXPERTS[0]:
            experts += nbytes * parallelism.expert_shards / parallelism.expert_parts
        else:
            shardable = nbytes * group.shardable / group.nbytes if group.nbytes else 0
            others += nbytes - shardable + shardable / parallelism.tp_size
    return experts, others


def _part(sizes: Sizes, parallelism: Parallelism, trained: bool) -> int:
    """Returns the bytes of one process's parts of all weights, or of those that train."""
    experts, others = whole_bytes(sizes, parallelism, trained)
    return round(experts / parallelism.expert_shards + others / parallelism.fsdp_size)


def _exchange_bytes(sizes: Sizes, parallelism: Parallelism, gradients: int) -> int:
    """Returns the bytes of gathered layers (FSDP) and of the buckets into which gradients are copied (DDP)."""
    exchange = 0
    if parallelism.fsdp_size > 1:
        layer = (sizes.largest_layer - sizes.expert_layer) / parallelism.tp_size
        if parallelism.expert_shards > 1:
            layer += sizes.expert_layer * parallelism.expert_shards / parallelism.expert_parts
        exchange += round(GATHERED_LAYERS * layer)
    elif parallelism.batches > 1:
        exchange += gradients
    return exchange
