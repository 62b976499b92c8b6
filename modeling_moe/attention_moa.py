# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines mixtures of attention heads (MoA), in which each token chooses the experts of its queries and outputs.

# B rows, S tokens per row, T = B*S tokens, H hidden, E experts, K experts per token, n query heads of an expert,
# G key and value heads, D features of a head
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_experts import AttentionExperts
from .attention_routed import RoutedAttention
from .compatibility import one_cache
from .router import RoutingContext
from .router_losses import TokenWeights
from .router_statistics import RouterStatistics, layer_statistics
from .router_topk import TopKRouter
from .router_view import Replaced


class MixtureOfAttentionHeads(RoutedAttention):
    """Attention whose query and output projections are experts; keys and values are shared by all experts.

    `y = sum_s w_s o_s W_O^(I_s) + b` with `o_s = attention(x W_Q^(I_s), x W_K, x W_V)` for the K chosen experts I, and w
    the softmax of their router logits (Zhang et al., arXiv:2210.05144, eq. 3-7; ModuleFormer, arXiv:2306.04640; JetMoE,
    arXiv:2404.07413, section 2.2). One choice drives both projections. The cache holds the G heads of keys and values, which
    all experts read.

    A token uses `num_attention_heads` = K * n query heads, which the attention function gets in the order (G, K, n / G):
    the heads that read one key head stand together, as grouped-query attention has them. The bias of the queries and the
    norms are shared by all experts.
    """

    routed_attention = "moa"
    router_class = TopKRouter
    replaced: ClassVar[Replaced] = {
        "scoring_func": lambda config: "softmax",
        "norm_topk_prob": lambda config: True,
    }

    @classmethod
    def validate(cls, config: Any) -> None:
        heads, top_k, groups = config.num_attention_heads, config.attention_experts_per_tok, config.num_key_value_heads
        if heads % (top_k * groups):
            raise ValueError(
                f"num_attention_heads ({heads}) is not a multiple of attention_experts_per_tok * num_key_value_heads "
                f"({top_k} * {groups}): each of a token's experts has as many query heads as the others, and a whole number "
                "of them for each key head. Lower num_key_value_heads or raise num_attention_heads."
            )

    def query_width(self, config: Any) -> int:
        """Returns the number n * D of features of the queries of one expert."""
        return config.num_attention_heads // config.attention_experts_per_tok * config.head_dim

    def add_queries(self, config: Any) -> None:
        """Makes the router, and the experts, which are the query and the output projections."""
        width, view = self.query_width(config), self.view(config)
        self.add_router(self.router_class, view, self.layer_idx)
        self.top_k, self.groups = config.attention_experts_per_tok, config.num_key_value_heads
        self.experts = AttentionExperts(view, config.attention_experts, width)
        self.q_bias = nn.Parameter(torch.empty(width)) if self.qkv_bias else None

    def add_output(self, config: Any) -> None:
        """Makes the bias of the output, which the experts share."""
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if self.output_bias else None

    def init_weights(self, std: float) -> None:
        """Fills the sinks and the shared biases of a new model."""
        super().init_weights(std)
        for bias in (self.q_bias, self.o_bias):
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
        """Computes attention over (B, S, H).

        Args:
            hidden_states, position_embeddings, attention_mask, cache: those of [`~modeling_moe.attention.MoEAttention`].
            routing_context: context of the tokens; None for whole rows without padding.
            token_weights: weight of each token in the router losses; None to measure nothing.

        Returns:
            Output (B, S, H); from eager attention the probabilities (B, heads, S, S'), heads in the order of the class's
            docstring; and the statistics of the router, an empty list without `token_weights`.
        """
        cache = one_cache(self, cache, past_key_values)
        context = routing_context or RoutingContext(len(hidden_states))
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        chosen, routing = self.route(tokens, context)
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        # tensor parallelism leaves a process some of the key heads
        self.groups = key.shape[-1] // self.head_dim
        sinks = None if self.sinks is None else self._by_group(self.sinks.expand(self.top_k, -1)).flatten()
        probabilities = None

        def attend(queries: torch.Tensor) -> torch.Tensor:
            """Maps queries (T, K, n * D) to attended values (T, K, n * D)."""
            nonlocal probabilities
            if self.q_bias is not None:
                queries = queries + self.q_bias
            query = queries.unflatten(0, hidden_states.shape[:2])  # (B, S, K, n * D)
            heads = self.heads(query, key, value, position_embeddings, cache, kwargs)
            attended, probabilities = self.call_attention(*heads, attention_mask, kwargs, sinks)
            attended = attended.unflatten(2, (self.groups, self.top_k, -1)).transpose(2, 3)  # (B, S, K, G, n / G, D)
            return attended.reshape(len(tokens), self.top_k, -1)

        output = self.experts(tokens, routing.index, routing.weight, attend)
        if self.o_bias is not None:
            output = output + self.o_bias
        statistics = []
        if token_weights is not None:
            statistics.append(layer_statistics(self, chosen, routing, context, token_weights))
        return output.view_as(hidden_states), probabilities, statistics

    def query_heads(self, query: torch.Tensor) -> torch.Tensor:
        """Returns queries (B, S, K, n * D), or (B, S, K, n, D), as (B, G * K * n / G, S, D)."""
        heads = query.reshape(*query.shape[:3], -1, self.head_dim)  # (B, S, K, n, D)
        return self._by_group(heads.permute(0, 2, 3, 1, 4), dim=1).flatten(1, 3)

    def _by_group(self, heads: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Reorders the dimensions K, n at `dim` of all slots' heads to G, K, n / G."""
        return heads.unflatten(dim + 1, (self.groups, -1)).transpose(dim, dim + 1)
