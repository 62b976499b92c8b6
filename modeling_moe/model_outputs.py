# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a forward returns beside transformers' own outputs: what the routers tell."""

from dataclasses import dataclass
from functools import wraps

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .compatibility import gives_cache


@gives_cache
@dataclass
class MoEModelOutput(MoeModelOutputWithPast):
    """Output of [`MoEModel`]: transformers' own, and what the routers tell while training or on request.

    Attributes:
        router_loss: scalar, weighted sum of the router losses; only if the caller adds it to the loss itself.
        aux_loss: scalar without gradient, the load-balancing loss averaged over the sparse layers.
        expert_load: (sparse layers, E + Z), tokens sent to each expert, before any is dropped.
        dropped_share: (sparse layers,), share of these assignments that found no room; only with a capacity.
    """

    router_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    expert_load: torch.FloatTensor | None = None
    dropped_share: torch.FloatTensor | None = None


@gives_cache
@dataclass
class MoECausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of [`MoEForCausalLM`]: transformers' own, `expert_load` and `dropped_share`, see [`MoEModelOutput`]."""

    expert_load: torch.FloatTensor | None = None
    dropped_share: torch.FloatTensor | None = None


def detach_router_logits(forward):
    """Returns router logits without gradient while the model trains its router losses itself.

    A trainer that derives a balance loss from them (TRL's `SFTTrainer`) would otherwise count it twice.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if self.training and self.has_router_losses and getattr(outputs, "router_logits", None):
            outputs.router_logits = tuple(logits.detach() for logits in outputs.router_logits)
        return outputs

    return wrapper
