# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What an upcycling will make, known before any weight is read."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from ..cli import UserError
from ..configuration_moe import MoEConfig
from ..conversion import DENSE_FAMILIES, moe_config


@dataclass
class UpcyclingOptions:
    """How a dense model becomes sparse."""

    num_experts: int = field(default=8, metadata={"help": "experts of each layer"})
    num_experts_per_tok: int = field(default=2, metadata={"help": "experts that a token is sent to"})
    method: str = field(default="copy", metadata={"help": "copy: each expert starts as the dense network"})
    shared_expert: bool = field(
        default=False,
        metadata={"help": "keep the dense network as a shared expert; the routed experts then start with output 0"},
    )
    noise: float = field(
        default=0.0, metadata={"help": "noise on each expert's weights, in standard deviations of the weight tensor"}
    )
    norm_topk_prob: bool = field(default=True, metadata={"help": "a token's weights sum to 1; exactness needs it"})
    router_std: float = field(default=0.02, metadata={"help": "standard deviation of the new routers' weights"})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "weight of the load-balancing loss"})
    router_z_loss_coef: float = field(default=0.001, metadata={"help": "weight of the router's z-loss"})
    seed: int = field(default=0, metadata={"help": "seed of routers and noise"})

    def inexactness(self) -> str:
        """Why the result will not compute the dense model's function; empty if it will."""
        if self.shared_expert:
            # the routed experts' zero output projection stays zero under noise of its own size
            return ""
        if self.noise:
            return "noise moves every expert away from the dense network"
        if not self.norm_topk_prob:
            return "norm_topk_prob=False: a token's weights do not sum to 1"
        return ""


@dataclass(frozen=True)
class UpcyclingPlan:
    """The result's configuration and what it costs.

    Attributes:
        config: of the result.
        dense_params: parameters of the source.
        bytes_on_disk: of the result's weights.
        inexactness: why the function changes; empty if it does not.
    """

    config: MoEConfig
    dense_params: int
    bytes_on_disk: int
    inexactness: str


def make_plan(source: PreTrainedConfig, options: UpcyclingOptions, dtype: torch.dtype) -> UpcyclingPlan:
    """Plans the upcycling of a dense model.

    Args:
        source: the dense model's configuration, of one of `conversion.DENSE_FAMILIES`.
        options: how to upcycle.
        dtype: of the result's weights.

    Raises:
        UserError: if the source is not of those families, or an option makes no model.
    """
    from .methods import METHODS

    if source.model_type not in DENSE_FAMILIES:
        raise UserError(
            f"model_type {source.model_type!r} cannot be upcycled: it must be one of {', '.join(sorted(DENSE_FAMILIES))}"
        )
    if options.method not in METHODS:
        raise UserError(f"method {options.method!r} is unknown: it must be one of {', '.join(sorted(METHODS))}")
    for name in ("noise", "router_std"):
        if getattr(options, name) < 0:
            raise UserError(f"{name} is {getattr(options, name)}: it must be 0 or positive")
    dense = moe_config(source)
    changes = {
        "num_experts": options.num_experts,
        "num_experts_per_tok": options.num_experts_per_tok,
        "norm_topk_prob": options.norm_topk_prob,
        "router_aux_loss_coef": options.router_aux_loss_coef,
        "router_z_loss_coef": options.router_z_loss_coef,
        "mlp_layer_types": ["sparse"] * dense.num_hidden_layers,
        "num_shared_experts": int(options.shared_expert),
        "shared_expert_intermediate_size": None,
        "dtype": dtype,
    }
    config = MoEConfig(**(dense.to_dict() | changes))
    return UpcyclingPlan(config, dense.num_params(), config.num_params() * dtype.itemsize, options.inexactness())
