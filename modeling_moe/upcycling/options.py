# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the options of upcycling, and refuses combinations of which no model can be made."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args, get_origin, get_type_hints

from ..configuration_moe import MoEConfig
from ..utils.errors import UserError


# options that only the experts of feed-forward networks read
_OF_NETWORKS = (
    *(
        "num_experts",
        "num_experts_per_tok",
        "method",
        "granularity",
        "scaling",
        "shared_expert",
        "drop_ratio",
        "split",
    ),
    "norm_topk_prob",
)


@dataclass
class UpcyclingOptions:
    """These options say how dense models become a sparse one."""

    num_experts: int = field(
        default=8, metadata={"help": "number of experts in each sparse layer; each shard is one expert"}
    )
    num_experts_per_tok: int = field(default=2, metadata={"help": "number of experts that a token is sent to"})
    method: Literal["copy", "drop", "split"] = field(
        default="copy",
        metadata={
            "help": "copy: each expert starts as the dense network, or as a shard of it; drop: each expert starts as a copy in "
            "which a share of the neurons is drawn anew; split: the dense network's neurons are divided among the experts"
        },
    )
    granularity: int = field(
        default=1, metadata={"help": "number of shards that a copied network is cut into; each shard is one expert"}
    )
    scaling: Literal["exact", "megatron", "none"] = field(
        default="exact",
        metadata={
            "help": "factor on the experts' weights that compensates for the routing weights: exact (on up and down "
            "projection), megatron (the cube root of the factor on all three projections, as published) or none"
        },
    )
    shared_expert: bool = field(
        default=False,
        metadata={
            "help": "keep the dense network as a shared expert; the routed experts then start with an output of 0"
        },
    )
    noise: float = field(
        default=0.0,
        metadata={"help": "standard deviation of noise on each expert's tensors, relative to that of the tensor"},
    )
    noise_std: float = field(
        default=0.0, metadata={"help": "absolute standard deviation of noise on each expert's tensors"}
    )
    drop_ratio: float = field(
        default=0.5, metadata={"help": "share of an expert's neurons that method drop draws anew"}
    )
    split: Literal["random", "clustered"] = field(
        default="random",
        metadata={
            "help": "how method split groups neurons: random, or clustered by joint activity (needs calibration_data)"
        },
    )
    layers: str = field(
        default="all",
        metadata={
            "help": "layers whose feed-forward networks become experts: all, every:n (the n-th, 2n-th, ...), indices such as "
            "0,2,5, or none, if only attention gets experts"
        },
    )
    attention_experts: int = field(
        default=0,
        metadata={
            "help": "number of experts that the attention of every layer gets, each a copy of the query and output projections "
            "(a mixture of attention heads); 0 leaves attention as it is"
        },
    )
    attention_experts_per_tok: int = field(
        default=2, metadata={"help": "number of attention experts that a token is sent to"}
    )
    norm_topk_prob: bool = field(
        default=True, metadata={"help": "scale the routing weights of a token to the sum 1; an exact result needs it"}
    )
    sources: list[str] | None = field(
        default=None,
        metadata={"help": "further dense checkpoints whose networks become experts (Branch-Train-MiX)"},
    )
    source_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "weight of each source, the first source first, in the average of all tensors outside the experts"
        },
    )
    router_init: Literal["random", "zero", "text", "kmeans", "ridge"] = field(
        default="random",
        metadata={"help": "initial values of the routers; text, kmeans and ridge need calibration_data"},
    )
    router_std: float = field(
        default=0.02,
        metadata={
            "help": "standard deviation of random router weights; for router_init text and ridge, standard deviation of the "
            "noise that separates replicas of one domain, relative to that of the weights"
        },
    )
    router_logit_std: float = field(
        default=1.0,
        metadata={"help": "standard deviation of the router logits after router_init text, kmeans or ridge"},
    )
    calibration_data: list[str] | None = field(
        default=None, metadata={"help": "texts that the dense model is measured on, each as domain=file"}
    )
    calibration_tokens: int = field(default=8192, metadata={"help": "number of tokens measured in each domain"})
    ridge_lambda: float = field(
        default=1e-2, metadata={"help": "strength of the regularisation for router_init ridge"}
    )
    router_aux_loss_coef: float = field(
        default=0.005,
        metadata={"help": "coefficient of the load-balancing loss, which is num_experts_per_tok in balance"},
    )
    router_z_loss_coef: float = field(default=0.001, metadata={"help": "weight of the router's z-loss"})
    seed: int = field(default=0, metadata={"help": "seed of all random numbers"})

    @property
    def num_replicas(self) -> int:
        """Number of complete copies of the dense network in a layer: `num_experts / granularity`."""
        return self.num_experts // self.granularity

    @property
    def zero_router(self) -> bool:
        """Whether every router starts at 0, so that all experts have equal weights."""
        return self.router_init == "zero" or (self.router_init == "random" and self.router_std == 0)

    @property
    def replicas_tie(self) -> bool:
        """Whether some replicas have equal rows in the router.

        All rows are equal in a router of zeros, and those of one domain after `router_init` `text` or `ridge` without
        noise.
        """
        shared = self.router_init in ("text", "ridge") and self.num_replicas > len(self.calibration_data or [])
        return self.zero_router or (shared and self.router_std == 0)

    @property
    def needs_text(self) -> bool:
        """Whether the options require a measurement on `calibration_data`."""
        return self.router_init in ("text", "kmeans", "ridge") or self.split == "clustered"

    def for_attention(self) -> "UpcyclingOptions":
        """Returns these options as a router of attention reads them: the attention experts are the experts."""
        return replace(
            self,
            num_experts=self.attention_experts,
            num_experts_per_tok=self.attention_experts_per_tok,
            granularity=1,
        )

    def num_dropped(self, width: int) -> int:
        """Returns how many neurons method `drop` draws anew in an expert with `width` neurons."""
        return round(self.drop_ratio * width)

    def sparse_layers(self, num_hidden_layers: int) -> list[int]:
        """Returns the indices of the layers that become sparse, in ascending order.

        Raises:
            UserError: if `layers` is malformed, names no layer, or names one that the model does not have.
        """
        every, _, step = self.layers.partition("every:")
        try:
            if self.layers in ("all", "none"):
                return list(range(num_hidden_layers if self.layers == "all" else 0))
            if step and not every and int(step) > 0:
                layers = list(range(int(step) - 1, num_hidden_layers, int(step)))
            else:
                layers = sorted({int(index) for index in self.layers.split(",")})
        except ValueError:
            raise UserError(
                f"layers is {self.layers!r}: it must be all, none, every:n or indices such as 0,2,5"
            ) from None
        if not layers or not 0 <= layers[0] <= layers[-1] < num_hidden_layers:
            raise UserError(
                f"layers is {self.layers!r}: it must name at least one layer, between 0 and {num_hidden_layers - 1}"
            )
        return layers

    def check(self, dense: MoEConfig) -> None:
        """Refuses options of which no sparse model can be made from a dense one.

        Raises:
            UserError: if an option is refused; the message names the option and the remedy.
        """
        self._check_values()
        self._check_attention()
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
        for name in ("noise", "noise_std", "router_std", "ridge_lambda", "attention_experts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}: it must be 0 or positive")
        for name in ("num_experts", "granularity", "router_logit_std", "calibration_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}: it must be positive")
        if not 0 < self.drop_ratio <= 1:
            raise UserError(f"drop_ratio is {self.drop_ratio}: it must be above 0 and at most 1")
        if self.split != "random" and self.method != "split":
            raise UserError(f"split={self.split!r} has no effect with method={self.method!r}: set method to split")

    def _check_attention(self) -> None:
        default = {item.name: item.default for item in fields(self)}
        if not self.attention_experts:
            if self.attention_experts_per_tok != default["attention_experts_per_tok"]:
                raise UserError(
                    "attention_experts_per_tok has no effect without attention experts: set attention_experts"
                )
            if self.layers == "none":
                raise UserError("layers is 'none': set attention_experts, or name the layers that become sparse")
        if self.layers == "none":
            for name in _OF_NETWORKS:
                if getattr(self, name) != default[name]:
                    raise UserError(
                        f"{name} has no effect with layers='none', which leaves all networks dense: omit it"
                    )

    def _check_division(self, width: int) -> None:
        experts, shards = self.num_experts, self.granularity
        if self.method == "split":
            if shards != 1:
                raise UserError(f"granularity is {shards}: method split divides by num_experts alone, so keep it at 1")
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
                f"drop_ratio is {self.drop_ratio}: it must be large enough to draw one of an expert's {width // shards} neurons"
            )

    def _check_sources(self) -> None:
        count = 1 + len(self.sources or [])
        if count > 1 and self.method == "split":
            raise UserError("sources cannot be given with method split, which divides one network: set method to copy")
        if self.layers != "none" and self.num_replicas % count:
            raise UserError(
                f"num_experts / granularity ({self.num_replicas}) is not a multiple of the {count} sources: choose a "
                "multiple, so that each source fills equally many experts"
            )
        if self.attention_experts % count:
            raise UserError(
                f"attention_experts ({self.attention_experts}) is not a multiple of the {count} sources: choose a multiple, so "
                "that each source fills equally many experts"
            )
        weights = self.source_weights or [1 / count] * count
        if len(weights) != count:
            raise UserError(f"source_weights has {len(weights)} entries for {count} sources: give one for each")
        if not (all(weight >= 0 for weight in weights) and abs(sum(weights) - 1) <= 1e-6):
            raise UserError(f"source_weights are {weights}: give weights of 0 or more that sum to 1")
