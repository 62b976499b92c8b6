# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines routers that read what the router of the sparse layer before has passed on.

The decoder layer hands on a tensor (T, N) for the tokens of the present pass. A token's numbers depend on the token's own
earlier layers alone, so that routing stays causal, and decoding with a cache stores nothing.

# T tokens, H hidden, R router width, E experts, Z experts without weights (null and copy)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fields import Range, setting
from .router import CAPACITY_READS, Routing, RoutingContext, fp32_linear
from .router_topk import SELECTION_READS, TopKRouter


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class CarriedFields:
    """These fields configure routers that read what the router of the layer before has passed on."""

    router_hidden_size: int = setting(
        256, "The width of the router's own layers with router_type='zaya'.", Range(1, 2**20), by_router=True
    )


class CarryingRouter(TopKRouter):
    """Base class of the routers of this module, which choose the K experts with the highest scores."""

    carries = True

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        # the router of a hashed layer passes nothing on
        self.is_first = "sparse" not in config.mlp_layer_types[config.num_hash_layers : layer_idx]


class DagRouter(CarryingRouter):
    """Adds to the logits what the choice of the sparse layer before makes likely: `z_l = W_l x_l + U_l c_{l-1}`.

    `c` (E + Z) holds the probabilities of the chosen experts of the layer before, and 0 for the others. Experts of successive
    layers are the nodes of a directed acyclic graph, and the learned `transition` `U_l[j, i]` is the weight of the edge from
    expert i to expert j. `U` begins at 0, so that a new router is the router `topk`. The first sparse layer has no `U`.
    The gradient passes through `c` to the router of the layer before. Related are layerwise recurrent routers (Qiu et al.,
    arXiv:2408.06793), which carry a hidden state in the place of the choice.
    """

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.transition = None if self.is_first else nn.Parameter(torch.empty(self.num_outputs, self.num_outputs))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.transition is not None:
            init.zeros_(self.transition)

    def project(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        logits = super().project(hidden_states, context)
        if self.transition is None or context.carried is None:
            return logits
        return logits + fp32_linear(context.carried, self.transition)

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        routing = super().route(logits, context)
        chosen = torch.zeros_like(routing.probs).scatter(-1, routing.index, 1.0)
        return routing._replace(carried=routing.probs * chosen)


class ZayaRouter(CarryingRouter):
    """Routes by a small network over a state that is averaged over the layers: the router of ZAYA1 (arXiv:2511.17127).

    `r_l = D x_l + b + a * r_{l-1}` of width `router_hidden_size`, and the logits are
    `W gelu(W_2 gelu(W_1 rmsnorm(r_l) + b_1) + b_2)`. The first sparse layer has no `a`. ZAYA1 has one expert per token, a softmax
    that is not renormalised, a selection bias, and one null expert, whose selection bias begins at -1.
    """

    reads = CAPACITY_READS | SELECTION_READS | {
        "scoring_func",
        "norm_topk_prob",
        "routed_scaling_factor",
        "router_gradient",
        "router_jitter_noise",
        "router_aux_loss_scope",
        "router_hidden_size",
        "num_null_experts",
        "num_copy_experts",
    }  # fmt: skip
    norm_topk_prob_default = False

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        width = config.router_hidden_size
        self.weight = nn.Parameter(torch.empty(self.num_outputs, width))
        self.reduce_weight = nn.Parameter(torch.empty(width, config.hidden_size))
        self.reduce_bias = nn.Parameter(torch.empty(width))
        self.carried_scale = None if self.is_first else nn.Parameter(torch.empty(width))
        self.norm_scale = nn.Parameter(torch.empty(width))
        # flat parameters: an adapter that targets linear layers by their names must not find these
        self.first_weight, self.second_weight = (nn.Parameter(torch.empty(width, width)) for _ in range(2))
        self.first_bias, self.second_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        for weight in (self.reduce_weight, self.first_weight, self.second_weight):
            init.normal_(weight, mean=0.0, std=std)
        for bias in (self.reduce_bias, self.first_bias, self.second_bias):
            init.zeros_(bias)
        for scale in (self.carried_scale, self.norm_scale):
            if scale is not None:
                init.ones_(scale)
        if self.e_score_correction_bias is not None and self.num_null:
            null = torch.zeros(self.num_outputs)
            null[self.num_experts : self.num_experts + self.num_null] = -1.0
            init.copy_(self.e_score_correction_bias, null)

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        state = fp32_linear(self.jittered(hidden_states), self.reduce_weight, self.reduce_bias)  # (T, R)
        if self.carried_scale is not None and context.carried is not None:
            state = state + context.carried.to(state.dtype) * self.carried_scale.to(state.dtype)
        return self.route(self.logits_of(state), context)._replace(carried=state)

    def logits_of(self, state: torch.Tensor) -> torch.Tensor:
        """Returns the router logits (T, E + Z) of states (T, R)."""
        scale: Any = self.norm_scale.to(state.dtype)
        states = state * torch.rsqrt(state.square().mean(dim=-1, keepdim=True) + self.norm_eps) * scale
        for weight, bias in ((self.first_weight, self.first_bias), (self.second_weight, self.second_bias)):
            states = nn.functional.gelu(fp32_linear(states, weight, bias))
        return fp32_linear(states, self.weight)
