# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a user chooses of an upcycling, and which choices make no model."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from ..configuration_moe import MoEConfig
from ..utils.errors import UserError


@dataclass
class UpcyclingOptions:
    """How dense models become a sparse one."""

    num_experts: int = field(default=8, metadata={"help": "experts of each sparse layer, all shards counted"})
    num_experts_per_tok: int = field(default=2, metadata={"help": "experts that a token is sent to"})
    method: Literal["copy", "drop", "split"] = field(
        default="copy",
        metadata={
            "help": "copy: each expert starts as the dense network, or as a shard of it; drop: so, but for a share of its "
            "neurons, which are drawn anew; split: the neurons of the dense network are divided among the experts"
        },
    )
    granularity: int = field(
        default=1, metadata={"help": "shards that a copied network is cut into, each an expert of its own"}
    )
    scaling: Literal["exact", "megatron", "none"] = field(
        default="exact",
        metadata={
            "help": "factor on the experts' weights that makes up for the router's: exact (on up and down projection), "
            "megatron (its cube root on all three, as published) or none"
        },
    )
    shared_expert: bool = field(
        default=False,
        metadata={"help": "keep the dense network as a shared expert; the routed experts then start with output 0"},
    )
    noise: float = field(
        default=0.0, metadata={"help": "noise on each expert's tensors, in standard deviations of the tensor"}
    )
    noise_std: float = field(default=0.0, metadata={"help": "noise on each expert's tensors, its standard deviation"})
    drop_ratio: float = field(default=0.5, metadata={"help": "drop: share of an expert's neurons that is drawn anew"})
    split: Literal["random", "clustered"] = field(
        default="random",
        metadata={"help": "split: neurons at random, or those together that fire together (needs calibration_data)"},
    )
    layers: str = field(
        default="all",
        metadata={"help": "layers that become sparse: all, every:n (the n-th, 2n-th, ...) or indices such as 0,2,5"},
    )
    norm_topk_prob: bool = field(default=True, metadata={"help": "a token's weights sum to 1; exactness needs it"})
    sources: list[str] | None = field(
        default=None,
        metadata={"help": "further dense checkpoints, whose networks become experts too (Branch-Train-MiX)"},
    )
    source_weights: list[float] | None = field(
        default=None,
        metadata={"help": "the first source's and the further ones' weights in the average of all that is no expert"},
    )
    router_init: Literal["random", "zero", "text", "kmeans", "ridge"] = field(
        default="random", metadata={"help": "how the routers start; text, kmeans and ridge need calibration_data"}
    )
    router_std: float = field(
        default=0.02,
        metadata={
            "help": "random: standard deviation of the routers' weights; text, ridge: of the "
            "noise that tells replicas of one domain apart, in deviations of the weights"
        },
    )
    router_logit_std: float = field(
        default=1.0, metadata={"help": "text, kmeans, ridge: standard deviation that the logits are scaled to"}
    )
    calibration_data: list[str] | None = field(
        default=None, metadata={"help": "domain=file, texts that the dense model is measured on"}
    )
    calibration_tokens: int = field(default=8192, metadata={"help": "tokens of each domain that are measured"})
    ridge_lambda: float = field(default=1e-2, metadata={"help": "ridge: strength of the regularisation"})
    router_aux_loss_coef: float = field(
        default=0.005,
        metadata={"help": "coefficient of the load-balancing loss, which is num_experts_per_tok in balance"},
    )
    router_z_loss_coef: float = field(default=0.001, metadata={"help": "weight of the router's z-loss"})
    seed: int = field(default=0, metadata={"help": "seed of all that is drawn"})

    @property
    def num_replicas(self) -> int:
        """Whole networks that the experts of a layer make up."""
        return self.num_experts // self.granularity

    @property
    def zero_router(self) -> bool:
        """Whether every router starts at 0, so that all experts have the same weight."""
        return self.router_init == "zero" or (self.router_init == "random" and self.router_std == 0)

    @property
    def replicas_tie(self) -> bool:
        """Whether replicas have the same row in the router: all, or those of one domain of `text` and `ridge`."""
        shared = self.router_init in ("text", "ridge") and self.num_replicas > len(self.calibration_data or [])
        return self.zero_router or (shared and self.router_std == 0)

    @property
    def needs_text(self) -> bool:
        """Whether something must be measured on `calibration_data`."""
        return self.router_init in ("text", "kmeans", "ridge") or self.split == "clustered"

    def num_dropped(self, width: int) -> int:
        """Neurons that `drop` draws anew in an expert of that width."""
        return round(self.drop_ratio * width)

    def sparse_layers(self, num_hidden_layers: int) -> list[int]:
        """Indices of the layers that become sparse, ascending.

        Raises:
            UserError: if `layers` names none, or one that the model does not have.
        """
        every, _, step = self.layers.partition("every:")
        try:
            if self.layers == "all":
                return list(range(num_hidden_layers))
            if step and not every and int(step) > 0:
                layers = list(range(int(step) - 1, num_hidden_layers, int(step)))
            else:
                layers = sorted({int(index) for index in self.layers.split(",")})
        except ValueError:
            raise UserError(f"layers is {self.layers!r}: it must be all, every:n or indices such as 0,2,5") from None
        if not layers or not 0 <= layers[0] <= layers[-1] < num_hidden_layers:
            raise UserError(
                f"layers is {self.layers!r}: it must name layers between 0 and {num_hidden_layers - 1}, one at least"
            )
        return layers

    def check(self, dense: MoEConfig) -> None:
        """Refuses what cannot be made of a dense model.

        Raises:
            UserError: names the option and the remedy.
        """
        self._check_values()
        self._check_division(dense.intermediate_size)
        self._check_sources()
        self.sparse_layers(dense.num_hidden_layers)
        if self.needs_text and not self.calibration_data:
            name = "split" if self.split == "clustered" else "router_init"
            raise UserError(f"{name}={getattr(self, name)!r} measures the dense model on text: give calibration_data")

    def _check_values(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise UserError(f"{name} {value!r} is unknown: it must be one of {', '.join(get_args(kind))}")
        for name in ("noise", "noise_std", "router_std", "ridge_lambda"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}: it must be 0 or positive")
        for name in ("num_experts", "granularity", "router_logit_std", "calibration_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}: it must be positive")
        if not 0 < self.drop_ratio <= 1:
            raise UserError(f"drop_ratio is {self.drop_ratio}: it must lie above 0, and not above 1")
        if self.split != "random" and self.method != "split":
            raise UserError(f"split={self.split!r} has no effect with method={self.method!r}: set method to split")

    def _check_division(self, width: int) -> None:
        experts, shards = self.num_experts, self.granularity
        if self.method == "split":
            if shards != 1:
                raise UserError(f"granularity is {shards}: method split cuts by num_experts alone, leave it at 1")
            if width % experts:
                raise UserError(
                    f"num_experts ({experts}) does not divide the dense network's width {width}: choose a divisor"
                )
            return
        for name, value in (("num_experts", experts), ("the dense network's width", width)):
            if value % shards:
                raise UserError(f"granularity ({shards}) does not divide {name} ({value}): choose a divisor")
        if self.method == "drop" and not 0 < self.num_dropped(width // shards) <= width // shards:
            raise UserError(
                f"drop_ratio is {self.drop_ratio}: it must lie above 0 by a neuron of an expert's {width // shards} at least"
            )

    def _check_sources(self) -> None:
        count = 1 + len(self.sources or [])
        if count > 1 and self.method == "split":
            raise UserError("sources cannot be given with method split, which divides one network: set method to copy")
        if self.num_replicas % count:
            raise UserError(
                f"num_experts / granularity ({self.num_replicas}) is not a multiple of the {count} sources: choose one, so "
                "that each fills as many experts"
            )
        weights = self.source_weights or [1 / count] * count
        if len(weights) != count:
            raise UserError(f"source_weights has {len(weights)} entries for {count} sources: give one for each")
        if not (all(weight >= 0 for weight in weights) and abs(sum(weights) - 1) <= 1e-6):
            raise UserError(f"source_weights are {weights}: give weights of 0 or more that sum to 1")
