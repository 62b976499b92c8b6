# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The routers that an upcycled model starts with.

# E experts, G granularity, R = E / G replicas of the dense network, H hidden
"""

from collections.abc import Callable, Mapping

import torch

from ..checkpoints import LazyTensor
from ..configuration_moe import MoEConfig
from ..utils.seeds import generator_for
from .options import UpcyclingOptions


Measured = Mapping[str, torch.Tensor]


def random_rows(layer: int, shape: tuple[int, int], options: UpcyclingOptions, measured: Measured) -> torch.Tensor:
    """Normal, of standard deviation `router_std`."""
    return options.router_std * torch.randn(shape, generator=generator_for(options.seed, layer, "router"))


def zero_rows(layer: int, shape: tuple[int, int], options: UpcyclingOptions, measured: Measured) -> torch.Tensor:
    """All logits 0: ties, which send every token to the same experts until noise or a bias breaks them."""
    return torch.zeros(shape)


def measured_rows(layer: int, shape: tuple[int, int], options: UpcyclingOptions, measured: Measured) -> torch.Tensor:
    """From text, see [`~modeling_moe.upcycling.calibration.measure`]."""
    return measured[f"layers.{layer}.router"]


# router_init -> rows (R, H) fp32 of a layer
ROUTER_INITS: dict[str, Callable[[int, tuple[int, int], UpcyclingOptions, Measured], torch.Tensor]] = {
    "random": random_rows,
    "zero": zero_rows,
    "text": measured_rows,
    "kmeans": measured_rows,
    "ridge": measured_rows,
}


def router_weight(layer: int, config: MoEConfig, options: UpcyclingOptions, measured: Measured) -> LazyTensor:
    """The weight of a layer's router.

    All G shards of a replica have its row, so that they are chosen together (virtual groups, arXiv:2410.07524): expert
    `j * G + s` is shard s of replica j.

    Args:
        layer: index of the layer.
        config: of the result.
        options: `router_init` and what it needs, `granularity`, `seed`.
        measured: what [`~modeling_moe.upcycling.calibration.measure`] returned; empty for `random` and `zero`.

    Returns:
        (E, H) in `config.dtype`, fp32 if that is None.
    """
    shape = (options.num_replicas, config.hidden_size)

    def rows() -> torch.Tensor:
        replicas = ROUTER_INITS[options.router_init](layer, shape, options, measured)
        return replicas.repeat_interleave(options.granularity, dim=0)

    return LazyTensor.combine(
        rows, shape=(config.num_experts, config.hidden_size), dtype=config.dtype or torch.float32
    )
