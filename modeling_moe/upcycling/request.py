# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the one argument of every function that makes a part of an upcycled layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..checkpoints import LazyTensor
from ..configuration_moe import MoEConfig
from ..utils.seeds import generator_for
from .options import UpcyclingOptions


Network = dict[str, LazyTensor]
"""Maps the tensor names of a part of a layer, such as `up_proj.weight` of a feed-forward network, to lazy tensors."""

# name of a part of a layer, a feed-forward network or attention
Part = Literal["mlp", "self_attn"]
Place = tuple[Part, int]
"""A part of a layer, and the layer's index."""


def rows_of_router(place: Place) -> str:
    """Returns the name under which the measured rows of a router are kept."""
    part, layer = place
    return f"layers.{layer}." + ("router" if part == "mlp" else "attention_router")


def place_generator(seed: int, place: Place, *path: object) -> torch.Generator:
    """Returns a random generator that depends on the arguments alone."""
    part, layer = place
    return generator_for(seed, layer, *(() if part == "mlp" else (part,)), *path)


def weights_dtype(config: MoEConfig) -> torch.dtype:
    """Returns the dtype of a model's weights: `config.dtype`, or fp32 if the configuration has no dtype."""
    if isinstance(config.dtype, str):
        raise ValueError(f"dtype is the string {config.dtype!r}: set it to a torch.dtype.")
    return config.dtype or torch.float32


@dataclass(frozen=True)
class LayerRequest:
    """A request to upcycle one part of a layer: a feed-forward network, or attention.

    Attributes:
        networks: the layer's dense network in each source: `gate_proj.weight` (I, H) if gated, `up_proj.weight` (I,
            H), `down_proj.weight` (H, I), and their biases if there are any; or the tensors of attention. Routers do
            not read them.
        layer: index of the layer.
        config: configuration of the result.
        options: how to upcycle; of attention, [`UpcyclingOptions.for_attention`].
        measured: what [`~modeling_moe.upcycling.calibration.measure`] returned; empty if nothing was measured.
    """

    networks: Sequence[Network]
    layer: int
    config: MoEConfig
    options: UpcyclingOptions
    measured: Mapping[str, torch.Tensor]
    part: Part = "mlp"

    @property
    def router_rows(self) -> torch.Tensor:
        """Returns the measured router rows (R, H) fp32, one for each replica of the dense network or of attention."""
        return self.measured[rows_of_router((self.part, self.layer))]

    @property
    def neuron_order(self) -> torch.Tensor:
        """Returns the measured permutation (I,) int64 of the neurons; equal blocks of it are the clusters."""
        return self.measured[f"layers.{self.layer}.neurons"]

    def generator(self, *path: object) -> torch.Generator:
        """Returns a random generator that depends on the seed, the layer, the part and `path` alone."""
        return place_generator(self.options.seed, (self.part, self.layer), *path)
