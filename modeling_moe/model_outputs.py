# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the models' outputs: transformers' outputs and the measurements of the routers."""

from dataclasses import dataclass
from functools import wraps

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .compatibility import gives_cache


@gives_cache
@dataclass
class MoEModelOutput(MoeModelOutputWithPast):
    """The output of [`MoEModel`]: transformers' fields, and measurements of the routers in training or on request.

    Attributes:
        router_loss: scalar, weighted sum of the router losses; only if the caller adds it to the loss
            (`attach_router_loss=False`).
        aux_loss: scalar without gradient, the load-balancing loss averaged over the sparse layers, as transformers defines it:
            the number of experts per token in balance.
        expert_load: (L, E + Z) tokens sent to each expert in each sparse layer, before capacity.
        dropped_share: (L,) share of the assignments that capacity has dropped; None without capacity.
    """

    router_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    expert_load: torch.FloatTensor | None = None
    dropped_share: torch.FloatTensor | None = None


@gives_cache
@dataclass
class MoECausalLMOutput(MoeCausalLMOutputWithPast):
    """The output of [`MoEForCausalLM`]: transformers' fields, and the measurements that [`MoEModelOutput`] explains."""

    expert_load: torch.FloatTensor | None = None
    dropped_share: torch.FloatTensor | None = None


def detach_router_logits(forward):
    """Decorates a forward so that router logits have no gradient while the model trains its router losses itself.

    A trainer that computes a balance loss from router logits (TRL's `SFTTrainer`) would count the loss twice.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if self.training and self.has_router_losses and getattr(outputs, "router_logits", None):
            outputs.router_logits = tuple(logits.detach() for logits in outputs.router_logits)
        return outputs

    return wrapper
