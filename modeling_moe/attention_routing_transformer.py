# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines a causal form of the Routing Transformer, in which a query attends to the keys of its own cluster.

# B rows, S tokens per row, T = B*S tokens, S' keys per row, n query heads, G key heads, C clusters of a key head,
# P = n + G parts of a routing, D features of a head
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import LinearProjections
from .attention_routed import ChosenParts, RoutedAttention
from .compatibility import one_cache
from .configuration_fields import Condition, Range, setting
from .router import Router, Routing, RoutingContext, extend_history, history_layer
from .router_losses import TokenWeights
from .router_statistics import RouterStatistics
from .router_view import Replaced


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class RoutingTransformerFields:
    """These fields configure the Routing Transformer's attention."""

    attention_cluster_window: int | None = setting(
        None,
        "The number of latest keys of its own cluster that a query of routed_attention='routing_transformer' attends to; None "
        "means all of them. Every token attends to itself beside them.",
        Range(1, 2**31),
        conditions=(
            Condition(
                lambda config: config.routed_attention == "routing_transformer",
                "set routed_attention='routing_transformer'",
            ),
        ),
    )


def routing_vectors(heads: torch.Tensor) -> torch.Tensor:
    """Returns heads (..., D) without gradient, in fp32 or fp64, shifted to mean 0 and scaled to norm 1.

    It is the paper's layer norm without scale and shift, divided by sqrt(D) (Roy et al., arXiv:2003.05997).
    """
    heads = heads.detach().to(torch.promote_types(heads.dtype, torch.float32))
    return nn.functional.normalize(heads - heads.mean(dim=-1, keepdim=True), dim=-1)


class ClusterRouter(Router):
    """Puts each query head and each key head of a token into the cluster of the nearest centroid.

    The buffer `centroids` (G, C, D) has centroids of norm 1 for each key head, which the query heads that read the key head
    share. The nearest centroid has the largest product with the routing vector, because all norms are 1. The controller
    "centroids" moves them. Nothing here has a gradient: clusters follow the queries and keys, as in the paper.

    The P parts of a routing are the n query heads and then the G key heads. The logits are the products, the probabilities
    1 / P at the chosen clusters, and the weights 1. `Routing.mixture` has the routing vectors (T, P, D).
    """

    reads = frozenset()
    differentiable = False
    default_controller = "centroids"

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.register_parameter("weight", None)
        queries, groups, clusters = config.num_attention_heads, config.num_key_value_heads, config.attention_experts
        self.ema_decay = config.router_ema_decay
        self.centroids = nn.Buffer(torch.zeros(groups, clusters, config.head_dim, dtype=torch.float32))
        self.parts = queries + groups
        # key head of each part
        self.group_of = [head * groups // queries for head in range(queries)] + list(range(groups))

    def init_weights(self, std: float) -> None:
        init.normal_(self.centroids)
        init.copy_(self.centroids, nn.functional.normalize(self.centroids, dim=-1))

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        """Returns the routing of tokens by their projected queries and keys, (T, P * D)."""
        vectors = routing_vectors(hidden_states.unflatten(-1, (self.parts, -1)))  # (T, P, D)
        centroids = self.centroids[self.group_of].to(vectors.dtype)  # (P, C, D)
        products = torch.einsum("tpd,pcd->tpc", vectors, centroids)
        first = torch.arange(self.parts, device=vectors.device) * products.shape[-1]
        index = products.argmax(dim=-1) + first
        weight = torch.ones_like(products[..., 0])
        logits = products.flatten(1)
        probs = torch.zeros_like(logits).scatter(1, index, weight / self.parts)
        return Routing(logits, weight, index, probs, mixture=vectors)

    def cluster_sums(self, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns the sum of the routing vectors in each cluster, padding excluded: (G, C, D)."""
        assert routing.mixture is not None  # `decide` gives the vectors
        clusters, vectors = self.centroids.shape[1], routing.mixture
        place = torch.tensor(self.group_of, device=vectors.device) * clusters + routing.index % clusters
        if token_mask is not None:
            vectors = vectors * (token_mask > 0).to(vectors.dtype)[:, None, None]
        sums = vectors.new_zeros(self.centroids.shape).flatten(0, 1)
        return sums.index_add(0, place.flatten(), vectors.flatten(0, 1)).view_as(self.centroids)


def cluster_mask(queries: torch.Tensor, keys: torch.Tensor, clusters: int, window: int | None = None) -> torch.Tensor:
    """Marks the keys that a query's cluster lets it attend to: keys of its own cluster, and the query's own token.

    Args:
        queries: (B, n, S) clusters of the last S tokens' queries.
        keys: (B, n, S') clusters of the keys that each query head reads; `clusters` marks padding, which is in no cluster.
        clusters: number C of clusters.
        window: number of latest keys of the cluster that count; None for all.

    Returns:
        (B, n, S, S') bool. Later keys are marked too, which the causal mask excludes.
    """
    allowed = queries[..., :, None] == keys[..., None, :]
    length, total = queries.shape[-1], keys.shape[-1]
    if window is not None:
        counts = nn.functional.one_hot(keys, clusters + 1).cumsum(dim=2)  # (B, n, S', C + 1), keys so far
        rank = counts.gather(3, keys[..., None]).squeeze(3)
        seen = counts[:, :, total - length :].gather(3, queries[..., None])  # (B, n, S, 1)
        allowed = allowed & (seen - rank[..., None, :] < window)
    own = torch.arange(total - length, total, device=keys.device)[:, None] == torch.arange(total, device=keys.device)
    return allowed | own


class RoutingTransformerAttention(RoutedAttention, LinearProjections):
    """Attention in which each query attends to earlier keys of its own cluster, and to its own token.

    It is the content-based sparse attention of the Routing Transformer (Roy et al., arXiv:2003.05997) in a causal
    form. The paper lets each centroid choose the w nearest tokens of the whole sequence, so that a later token can take the
    place of an earlier one, and what an earlier token attends to reveals later ones. Here each query and each key belongs to
    the cluster of the nearest centroid, which depends on no other token, and of its cluster a query attends to the
    `attention_cluster_window` latest keys.

    Clusters follow the projected queries and keys before norm and rotation. The cache keeps the keys' clusters. The attention
    function gets a mask (B, n, S, S'), and computes all products: the sparsity saves no time.
    """

    routed_attention = "routing_transformer"
    router_class = ClusterRouter
    reads = ClusterRouter.reads
    routes_mask = True
    replaced: ClassVar[Replaced] = {
        "router_parts": lambda config: config.num_attention_heads + config.num_key_value_heads,
        "num_experts": lambda config: (
            (config.num_attention_heads + config.num_key_value_heads) * config.attention_experts
        ),
        "num_experts_per_tok": lambda config: config.num_attention_heads + config.num_key_value_heads,
        "controller": lambda config: ClusterRouter.default_controller,
    }

    @classmethod
    def validate(cls, config: Any) -> None:
        if config.attention_experts_per_tok != 1:
            raise ValueError(
                f"attention_experts_per_tok is {config.attention_experts_per_tok}: with routed_attention='routing_transformer' "
                "a query or a key belongs to one cluster, set it to 1."
            )

    def add_queries(self, config: Any) -> None:
        """Makes the router and the query projection."""
        view = self.view(config)
        self.add_router(self.router_class, view, self.layer_idx)
        self.experts = ChosenParts(view, view.num_experts)
        self.clusters, self.window = config.attention_experts, config.attention_cluster_window
        self.history = history_layer(view, self.layer_idx)
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
        """Computes attention over (B, S, H), as [`~modeling_moe.attention_moa.MixtureOfAttentionHeads.forward`] does.

        Raises:
            ValueError: for an attention implementation that takes no mask for each head, or a static cache.
        """
        implementation = self.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.eager)
        # by the function: another package may register it under a name of its own
        if function not in (self.eager, ALL_ATTENTION_FUNCTIONS["sdpa"]):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no mask for each head, which "
                "routed_attention='routing_transformer' needs: use 'sdpa' or 'eager'."
            )
        cache = one_cache(self, cache, past_key_values)
        context = routing_context or RoutingContext(len(hidden_states))
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        chosen, routing = self.route(torch.cat([query, key], dim=-1).flatten(0, 1), context)

        def use(index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            """Makes the mask of the clusters."""
            return self._mask(index, context, cache)

        mask = self.experts(hidden_states.flatten(0, 1), routing.index, routing.weight, use)
        heads = self.heads(query, key, value, position_embeddings, cache, kwargs)
        mask = _combined(attention_mask, mask[..., -heads[1].shape[2] :])
        attended, probabilities = self.call_attention(*heads, mask, kwargs, self.sinks)
        statistics = self.measured(chosen, routing, context, token_weights)
        return self.o_proj(attended.flatten(2)), probabilities, statistics

    def _mask(self, index: torch.Tensor, context: RoutingContext, cache: Cache | None) -> torch.Tensor:
        """Returns the mask (B, n, S, S') of the clusters, S' all tokens so far, and adds the keys' clusters to the cache."""
        cluster = (index % self.clusters).unflatten(0, (context.batch_size, -1))  # (B, S, P)
        queries, keys = cluster.tensor_split([self.config.num_attention_heads], dim=-1)
        if (real := context.by_row(context.token_mask)) is not None:
            keys = keys.where(real[..., None] > 0, self.clusters)
        keys = extend_history(cache, self.history, keys.float()).long()
        keys = keys.transpose(1, 2).repeat_interleave(self.num_key_value_groups, dim=1)
        return cluster_mask(queries.transpose(1, 2), keys, self.clusters, self.window)


def _combined(attention_mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    """Excludes keys from transformers' mask, boolean or added to the products; None stands for the causal mask."""
    if attention_mask is None:
        causal = torch.ones(allowed.shape[-2:], dtype=torch.bool, device=allowed.device)
        return allowed & causal.tril(allowed.shape[-1] - allowed.shape[-2])
    if attention_mask.dtype == torch.bool:
        return attention_mask & allowed
    return attention_mask.where(allowed, torch.finfo(attention_mask.dtype).min)
