# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the routers that an upcycled model starts with.

# E experts, G granularity (1 in attention), R = E / G replicas of the dense network or of attention, H hidden
"""

from collections.abc import Callable

import torch

from ..checkpoints import LazyTensor
from .request import LayerRequest, weights_dtype


def random_rows(request: LayerRequest) -> torch.Tensor:
    """Returns rows (R, H) fp32 from a normal distribution with mean 0 and standard deviation `router_std`."""
    shape = (request.options.num_replicas, request.config.hidden_size)
    return request.options.router_std * torch.randn(shape, generator=request.generator("router"))


def zero_rows(request: LayerRequest) -> torch.Tensor:
    """Returns rows (R, H) fp32 of zeros.

    All router logits are then equal: every token goes to the same experts until noise or a selection bias breaks the
    tie.
    """
    return torch.zeros(request.options.num_replicas, request.config.hidden_size)


def measured_rows(request: LayerRequest) -> torch.Tensor:
    """Returns rows (R, H) fp32 that were measured on text, see [`~modeling_moe.upcycling.calibration.measure`]."""
    return request.router_rows


# router_init -> function that makes the rows (R, H) of one layer
ROUTER_INITS: dict[str, Callable[[LayerRequest], torch.Tensor]] = {
    "random": random_rows,
    "zero": zero_rows,
    "text": measured_rows,
    "kmeans": measured_rows,
    "ridge": measured_rows,
}


def router_weight(request: LayerRequest) -> LazyTensor:
    """Returns the router weight (E, H) of a layer in `config.dtype`, or in fp32 if the configuration has no dtype.

    Expert `j * G + s` is shard s of replica j. All G shards of a replica get one row, so that they are chosen together
    (virtual groups, He et al., arXiv:2410.07524).
    """
    config, options = request.config, request.options

    def rows() -> torch.Tensor:
        return ROUTER_INITS[options.router_init](request).repeat_interleave(options.granularity, dim=0)

    return LazyTensor.combine(rows, shape=(options.num_experts, config.hidden_size), dtype=weights_dtype(config))
