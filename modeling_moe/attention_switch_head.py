# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines SwitchHead attention, in which each head has experts for its values and experts for its outputs.

# B rows, S tokens per row, T = B*S tokens, H hidden, n heads, E experts of a head, K experts of a head per token,
# D features of a head
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_experts import AttentionExperts, projections
from .attention_routed import RoutedAttention
from .compatibility import one_cache
from .configuration_fields import COEFFICIENT, PROBABILITY, Condition, setting
from .router import Routing, RoutingContext, masked_mean
from .router_losses import TokenWeights
from .router_statistics import RouterStatistics
from .router_topk import TopKRouter
from .router_view import Replaced


_SWITCH_HEAD = Condition(lambda config: config.routed_attention == "switch_head", "set routed_attention='switch_head'")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class SwitchHeadFields:
    """These fields configure SwitchHead attention."""

    attention_expert_dropout: float | int = setting(
        0.0,
        "The probability in training that a token cannot choose an expert of routed_attention='switch_head'.",
        PROBABILITY,
        effect="training",
        conditions=(_SWITCH_HEAD,),
    )
    attention_entropy_loss_coef: float | int = setting(
        0.0,
        "The coefficient in training of the negative entropy of the mean softmax of a head's router logits, the regulariser of "
        "sigma-MoE (arXiv:2310.10837), for routed_attention='switch_head'.",
        COEFFICIENT,
        effect="training",
        conditions=(_SWITCH_HEAD,),
    )


class SwitchHeadRouter(TopKRouter):
    """Chooses, for each of 2n independent parts of its outputs, the K experts with the largest logits; weights are sigmoids.

    The first n parts choose the experts of the n heads' values, the other n parts those of their outputs. In training
    each logit is masked with the probability `attention_expert_dropout`. Rows of the weight begin with one norm, so that only
    the angle between a token and a row decides at first (sigma-MoE, arXiv:2310.10837).
    """

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.parts = config.router_parts
        self.expert_dropout, self.entropy_coef = config.attention_expert_dropout, config.attention_entropy_loss_coef

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        norm = std * self.weight.shape[1] ** 0.5
        init.copy_(self.weight, nn.functional.normalize(self.weight, dim=-1) * norm)

    def score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        by_part = scores.unflatten(-1, (self.parts, -1))
        probs = by_part / (by_part.sum(dim=-1, keepdim=True) + 1e-20) / self.parts
        return scores, probs.flatten(1)

    def ranking(self, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        # large logits have equal sigmoids
        return logits if self.e_score_correction_bias is None else super().ranking(scores, logits)

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if self.training and self.expert_dropout > 0:
            scores = scores.masked_fill(torch.rand_like(scores) < self.expert_dropout, float("-inf"))
        by_part = scores.unflatten(-1, (self.parts, -1))  # (T, 2n, E)
        index = by_part.topk(self.top_k // self.parts, dim=-1).indices
        first = torch.arange(self.parts, device=index.device)[:, None] * by_part.shape[-1]
        return (index + first).flatten(1)

    @property
    def adds_loss(self) -> bool:
        return self.entropy_coef > 0

    def auxiliary_loss(self, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor | None:
        if not self.adds_loss:
            return None
        mean = masked_mean(routing.logits.unflatten(-1, (self.parts, -1)).softmax(dim=-1), token_mask)  # (2n, E)
        return -self.entropy_coef * torch.special.entr(mean).sum(dim=-1).mean()


class SwitchHeadExperts(AttentionExperts):
    """The experts of n heads, E for each head: `up_proj` (n * E, D, H) makes values, `down_proj` (n * E, H, D) outputs."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        attend: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Computes the values, lets the heads attend to them, and computes the weighted sum of the outputs.

        It is one call for both projections, because PEFT, FSDP and offloading wrap `forward` alone.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, 2n * K) integers, first the value experts and then `n * E` plus the output experts; `2n * E` marks an
                empty assignment.
            top_k_weights: (T, 2n * K) factors on the experts' values and outputs.
            attend: maps the weighted values of the chosen experts (T, n * K, D) to what the heads have attended to, (T, n, D).

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        index, weight = top_k_index.chunk(2, dim=-1), top_k_weights.chunk(2, dim=-1)  # each (T, n * K)
        values = projections(self, index[0]).each("up_proj", hidden_states)
        attended = attend(values * weight[0][..., None].to(values.dtype))
        rows = attended.repeat_interleave(index[1].shape[1] // attended.shape[1], dim=1)
        outputs = projections(self, index[1] - self.num_experts)
        return outputs.weighted_sum("down_proj", rows, weight[1])


class SwitchHeadAttention(RoutedAttention):
    """Attention whose value and output projections are experts, which each head and each side chooses by itself.

    For head j, with sigmoid scores s and r of the source and the destination side and the K experts I and J with the largest
    logits: `v_j = sum_(e in I) s_e x W_V^(j,e)` and `y = sum_j sum_(e in J) r_e attention(x W_Q^j, x W_K^j, v_j) W_O^(j,e)`
    (Csordás et al., arXiv:2312.07987). Scores are not renormalised. Queries and keys are dense. The cache holds keys
    and the mixed values, so that decoding does not route earlier tokens again.

    The bias of the values is a head's, and is added to the mixture; the bias of the output is added to the sum.
    """

    routed_attention = "switch_head"
    router_class = SwitchHeadRouter
    replaced: ClassVar[Replaced] = {
        "router_parts": lambda config: 2 * config.num_attention_heads,
        "num_experts": lambda config: 2 * config.num_attention_heads * config.attention_experts,
        "num_experts_per_tok": lambda config: 2 * config.num_attention_heads * config.attention_experts_per_tok,
        "expected_experts_per_tok": lambda config: 2 * config.num_attention_heads * config.attention_experts_per_tok,
        "scoring_func": lambda config: "sigmoid",
        "norm_topk_prob": lambda config: False,
    }

    @classmethod
    def validate(cls, config: Any) -> None:
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads ({config.num_key_value_heads}) is not num_attention_heads "
                f"({config.num_attention_heads}): each head of routed_attention='switch_head' mixes its own values, make them "
                "equal."
            )
        if config.router_controller == "quantile":
            raise ValueError(
                "router_controller='quantile' aims at one threshold for all choices of a token, and the heads of "
                "routed_attention='switch_head' choose by themselves: set it to 'bias' or 'proportional'."
            )

    @classmethod
    def stacked_experts(cls, config: Any) -> int:
        return config.num_attention_heads * config.attention_experts

    def add_queries(self, config: Any) -> None:
        """Makes the router, the experts, which are the value and the output projections, and the query projection."""
        view = self.view(config)
        self.add_router(self.router_class, view, self.layer_idx)
        self.experts = SwitchHeadExperts(view, self.stacked_experts(config), config.head_dim)
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, self.query_width(config), bias=self.qkv_bias)

    def add_values(self, config: Any) -> None:
        """Makes the bias of the values."""
        self.v_bias = nn.Parameter(torch.empty(self.query_width(config))) if self.qkv_bias else None

    def add_output(self, config: Any) -> None:
        """Makes the bias of the output, which the experts share."""
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if self.output_bias else None

    def init_weights(self, std: float) -> None:
        """Fills the sinks and the biases of a new model."""
        super().init_weights(std)
        for bias in (self.v_bias, self.o_bias):
            if bias is not None:
                init.zeros_(bias)

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
        query, key, probabilities = self.q_proj(hidden_states), self.k_proj(hidden_states), None

        def attend(values: torch.Tensor) -> torch.Tensor:
            """Maps weighted values (T, n * K, D) to attended values (T, n, D)."""
            nonlocal probabilities
            value = values.unflatten(1, (self.num_heads, -1)).sum(dim=2).flatten(1)  # (T, n * D)
            if self.v_bias is not None:
                value = value + self.v_bias
            value = value.unflatten(0, hidden_states.shape[:2])
            heads = self.heads(query, key, value, position_embeddings, cache, kwargs)
            attended, probabilities = self.call_attention(*heads, attention_mask, kwargs, self.sinks)
            return attended.flatten(0, 1)

        output = self.experts(tokens, routing.index, routing.weight, attend)
        if self.o_bias is not None:
            output = output + self.o_bias
        statistics = self.measured(chosen, routing, context, token_weights)
        return output.view_as(hidden_states), probabilities, statistics
