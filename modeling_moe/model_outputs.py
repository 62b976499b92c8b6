# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the models' outputs: transformers' outputs and the measurements of the routers."""

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.output_capturing import OutputRecorder

from .compatibility import gives_cache
from .router import Router
from .router_kinds import KINDS, slots


@gives_cache
@dataclass
class MoEModelOutput(MoeModelOutputWithPast):
    """The output of [`MoEModel`]: transformers' fields, and measurements of the routers in training or on request.

    Attributes:
        router_loss: scalar, weighted sum of the router losses; only if the caller adds it to the loss
            (`attach_router_loss=False`).
        aux_loss: scalar without gradient, the load-balancing loss averaged over the sparse layers, as transformers defines it:
            the number of experts per token in balance. With routed attention it is the sum of both averages.
        expert_load: (L, E + Z) tokens sent to each expert in each sparse layer, before capacity.
        dropped_share: (L,) share of the assignments to these experts that capacity has dropped; None without capacity.
        attention_expert_load: (L', E') tokens sent to each expert of routed attention in each layer, before capacity.
        attention_router_logits: for each layer the router logits (T, E') of routed attention; None unless router logits were
            asked for.
        depth_load: (L'', 1) tokens that each layer of `depth_layers` processed.
        depth_router_logits: for each of these layers the router logits (T, 1); None unless router logits were asked for.
    """

    router_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    expert_load: torch.FloatTensor | None = None
    dropped_share: torch.FloatTensor | None = None
    attention_expert_load: torch.FloatTensor | None = None
    attention_router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_load: torch.FloatTensor | None = None
    depth_router_logits: tuple[torch.FloatTensor, ...] | None = None


@gives_cache
@dataclass
class MoECausalLMOutput(MoeCausalLMOutputWithPast):
    """The output of [`MoEForCausalLM`]: transformers' fields, and the measurements that [`MoEModelOutput`] explains."""

    expert_load: torch.FloatTensor | None = None
    dropped_share: torch.FloatTensor | None = None
    attention_expert_load: torch.FloatTensor | None = None
    attention_router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_load: torch.FloatTensor | None = None
    depth_router_logits: tuple[torch.FloatTensor, ...] | None = None


def router_recorders(config: Any) -> dict[str, OutputRecorder]:
    """Returns what transformers records as router logits, by the name of the output."""
    kinds = [KINDS[kind] for kind in slots(config)]
    return {kind.logits: OutputRecorder(Router, index=0, layer_name=kind.gate) for kind in kinds}


def record_router_logits(forward):
    """Decorates a forward so that `output_router_logits` asks for the router logits of every kind.

    The logits have no gradient while the model trains its router losses itself: a trainer that computes a balance loss from
    router logits (TRL's `SFTTrainer`) would count the loss twice.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        names = [KINDS[kind].logits for kind in self.slots]
        wanted = kwargs.get("output_router_logits")
        if wanted is None:
            wanted = self.config.output_router_logits
        outputs = forward(self, *args, **kwargs, **{f"output_{name}": wanted for name in names[1:]})
        for name in names:
            if self.training and self.has_router_losses and getattr(outputs, name, None):
                setattr(outputs, name, tuple(logits.detach() for logits in getattr(outputs, name)))
        return outputs

    return wrapper
