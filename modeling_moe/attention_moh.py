# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines mixtures of heads (MoH): each token chooses heads of plain attention, and weighs them.

# B rows, S tokens per row, T = B*S tokens, H hidden, n heads, E routed heads, n - E shared heads, K routed heads per token,
# D features of a head
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import LinearProjections
from .attention_routed import ChosenParts, RoutedAttention
from .compatibility import one_cache
from .configuration_fields import Condition, setting
from .router import Routing, RoutingContext, fp32_linear
from .router_losses import TokenWeights
from .router_statistics import RouterStatistics
from .router_topk import TopKRouter
from .router_view import Replaced


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class MixtureOfHeadsFields:
    """These fields configure mixtures of heads."""

    attention_head_gates: Literal["softmax", "unit"] = setting(
        "softmax",
        "The gates on the heads of routed_attention='moh': \"softmax\" multiplies each head by the probabilities of the "
        'paper\'s equations, which sum to at most 1 over all heads; "unit" scales them to a mean of 1 over the heads that a '
        "token uses, with the weights of the chosen heads divided by their sum, as in the vision models that the authors "
        "released.",
        conditions=(Condition(lambda config: config.routed_attention == "moh", "set routed_attention='moh'"),),
    )


class HeadRouter(TopKRouter):
    """Weighs the shared heads and chooses among the routed heads (Jin et al., arXiv:2410.11842).

    With `[alpha_1, alpha_2] = softmax(x W_h)` the gate of a shared head is `alpha_1 softmax(x W_s)_i`, and the gate of a
    routed head among the K largest is `alpha_2 softmax(x W_r)_i`. Without shared heads alpha_2 is 1. `Routing.mixture` has
    the gates (T, n - E) of the shared heads; without shared heads it is None.
    """

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.num_shared = config.num_attention_heads - config.num_experts
        self.unit = config.attention_head_gates == "unit"
        rows = self.num_shared if self.num_shared > 1 else 0  # the softmax of one number is 1
        self.shared_weight = nn.Parameter(torch.empty(rows, config.hidden_size)) if rows else None
        self.kind_weight = nn.Parameter(torch.empty(2, config.hidden_size)) if self.num_shared else None

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        for weight in (self.shared_weight, self.kind_weight):
            if weight is not None:
                init.normal_(weight, mean=0.0, std=std)

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        routing = super().decide(hidden_states, context)
        weight = routing.weight * self.top_k if self.unit else routing.weight
        if self.kind_weight is None:
            return routing._replace(weight=weight)
        alpha = fp32_linear(hidden_states, self.kind_weight).softmax(dim=-1)  # (T, 2)
        shared = torch.ones_like(alpha[:, :1])
        if self.shared_weight is not None:
            shared = fp32_linear(hidden_states, self.shared_weight).softmax(dim=-1)
        if self.unit:
            alpha, shared = 2 * alpha, self.num_shared * shared
        return routing._replace(weight=alpha[:, 1:] * weight, mixture=alpha[:, :1] * shared)


def head_gates(
    index: torch.Tensor, weight: torch.Tensor, shared: torch.Tensor | None, num_experts: int
) -> torch.Tensor:
    """Returns the gates (T, n) of all heads, shared heads first; 0 where a token does not use a head.

    Args:
        index: (T, K) routed heads; `num_experts` marks an empty assignment.
        weight: (T, K) gates of the routed heads.
        shared: (T, n - E) gates of the shared heads; None without shared heads.
        num_experts: number E of routed heads.
    """
    gates = weight.new_zeros(len(weight), num_experts + 1).scatter_add(1, index, weight)[:, :num_experts]
    return gates if shared is None else torch.cat([shared, gates], dim=-1)


class MixtureOfHeads(RoutedAttention, LinearProjections):
    """Attention whose heads are experts: a token uses all shared heads, and K of the routed heads.

    `y = sum_i g_i attention(x W_Q^i, x W_K^i, x W_V^i) W_O^i` with the gates g of [`HeadRouter`] (Jin et al.,
    arXiv:2410.11842). The last `attention_experts` of the `num_attention_heads` heads are routed. The gates multiply the
    heads' outputs before the output projection, and have a gradient. All heads are computed for all tokens.
    """

    routed_attention = "moh"
    router_class = HeadRouter
    replaced: ClassVar[Replaced] = {
        "scoring_func": lambda config: "softmax",
        "norm_topk_prob": lambda config: config.attention_head_gates == "unit",
    }

    @classmethod
    def validate(cls, config: Any) -> None:
        heads, routed = config.num_attention_heads, config.attention_experts
        if routed > heads:
            raise ValueError(
                f"attention_experts ({routed}) is the number of heads that routed_attention='moh' routes: set it to at most "
                f"num_attention_heads ({heads})."
            )

    def add_queries(self, config: Any) -> None:
        """Makes the router and the query projection."""
        view = self.view(config)
        self.add_router(self.router_class, view, self.layer_idx)
        self.experts = ChosenParts(view, config.attention_experts)
        super().add_queries(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        routing_context: RoutingContext | None = None,
        token_weights: TokenWeights | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[RouterStatistics]]:
        """Computes attention over (B, S, H), as [`~modeling_moe.attention_moa.MixtureOfAttentionHeads.forward`] does."""
        cache = one_cache(self, cache, past_key_values)
        context = routing_context or RoutingContext(len(hidden_states))
        tokens = hidden_states.flatten(0, 1)
        chosen, routing = self.route(tokens, context)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        heads = self.heads(query, key, value, position_embeddings, cache, kwargs)
        attended, probabilities = self.call_attention(*heads, attention_mask, kwargs, self.sinks)  # (B, S, n, D)

        def use(index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            """Multiplies the heads by their gates."""
            gates = head_gates(index, weight, routing.mixture, self.experts.num_experts)
            return (attended * gates.view(*attended.shape[:3], 1).to(attended.dtype)).flatten(2)

        output = self.o_proj(self.experts(tokens, routing.index, routing.weight, use))
        return output, probabilities, self.measured(chosen, routing, context, token_weights)
