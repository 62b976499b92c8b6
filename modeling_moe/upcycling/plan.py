# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What an upcycling will make, known before any weight is read."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..cli import UserError
from ..configuration_moe import MoEConfig
from ..conversion import DENSE_FAMILIES, moe_config
from .methods import METHODS
from .options import UpcyclingOptions


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
