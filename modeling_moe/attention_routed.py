# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the base class of attention whose heads, or parts of them, a router chooses for each token."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import AttentionBase, eager_attention_with_sinks
from .router import CAPACITY_READS, Router, Routing, RoutingContext
from .router_block import Routed
from .router_losses import TokenWeights
from .router_statistics import RouterStatistics, layer_statistics
from .router_view import Replaced, RoutingView


# fields declared with `by_router` that the routers of attention read: those of training, balance and capacity
READS = CAPACITY_READS | {
    "router_jitter_noise",
    "router_aux_loss_scope",
    "router_selection_bias",
    "router_selection_bias_on",
}
# attribute -> what the routers of attention read in its place; a variant adds what its paper fixes
_OWN: Replaced = {
    "num_experts": lambda config: config.attention_experts,
    "num_experts_per_tok": lambda config: config.attention_experts_per_tok,
    "expected_experts_per_tok": lambda config: config.attention_experts_per_tok,
    "router_type": lambda config: "topk",
    "num_hash_layers": lambda config: 0,
    # the routers of feed-forward networks store what they must remember first, behind the keys of all layers
    "history_before": lambda config: lambda layer: config.mlp_layer_types.count("sparse") + layer,
}


def eager_attention_with_given_sinks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    s_aux: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes gpt-oss's eager attention with the sinks `s_aux` (heads,) in the place of the module's own."""
    given: Any = SimpleNamespace(
        sinks=s_aux, num_key_value_groups=module.num_key_value_groups, training=module.training
    )
    return eager_attention_with_sinks(given, query, key, value, *args, **kwargs)


class ChosenParts(nn.Module):
    """The place where a choice takes effect in attention whose experts have no matrices of their own, such as heads.

    It is called as experts are, so that what observes or replaces the choices of experts reaches it.

    Args:
        config: the model's configuration, as the router of these parts reads it.
        num_experts: number of parts among which the router chooses.
    """

    # experts that stand inside attention
    attends = True

    def __init__(self, config: Any, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts
        # of the instance, as transformers' experts have them
        self.has_gate, self.has_bias, self.is_transposed = False, False, False

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Returns `use(top_k_index, top_k_weights)`.

        Args:
            hidden_states: (T, H), the tokens that have chosen.
            top_k_index: (T, K) integers, ids of the parts; `num_experts` and above mark an empty assignment.
            top_k_weights: (T, K) weights of the parts.
            use: computes what the choice is for.
        """
        return use(top_k_index, top_k_weights)


class RoutedAttention(Routed, AttentionBase):
    """Base class of attention with a router, which reads the layer's own input.

    A variant is a subclass in `modeling_moe.attention_catalogue.ROUTED_ATTENTION`. The forward of a variant takes
    `routing_context` and `token_weights` beside the arguments of [`~modeling_moe.attention.MoEAttention`], and returns the
    statistics of the routers as a third value: a list, empty if `token_weights` is None.
    """

    # class of the variant's routers
    router_class: ClassVar[type[Router]]
    # by_router fields that the variant's routers read
    reads: ClassVar[frozenset[str]] = READS
    # attribute of the configuration -> what the variant's routers read in its place
    replaced: ClassVar[Replaced] = {}
    # whether the attention mask depends on the routing, which only sdpa and eager attention can compute
    routes_mask: ClassVar[bool] = False

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_sinks:
            self.eager = eager_attention_with_given_sinks

    @classmethod
    def view(cls, config: Any) -> RoutingView:
        """Returns the configuration as the variant's routers read it."""
        return RoutingView(config, _OWN | cls.replaced, cls.reads)

    @classmethod
    def validate(cls, config: Any) -> None:
        """Checks a configuration that chooses this variant.

        Raises:
            ValueError: if the variant cannot serve the configuration; the message names the field and the remedy.
        """

    @classmethod
    def stacked_experts(cls, config: Any) -> int:
        """Returns the number of experts that are stacked in one parameter of a layer."""
        return config.attention_experts

    def measured(
        self, chosen: Routing, routing: Routing, context: RoutingContext, token_weights: TokenWeights | None
    ) -> list[RouterStatistics]:
        """Returns the statistics of the router, from its routing before and after capacity; none without `token_weights`."""
        return [] if token_weights is None else [layer_statistics(self, chosen, routing, context, token_weights)]

    def call_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
        sinks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Calls the attention function, once for all heads.

        Args:
            query: (B, heads, S, D).
            key, value: (B, G, S', D) and (B, G, S', D').
            attention_mask: mask of transformers for the attention implementation.
            kwargs: further keyword arguments of the attention function.
            sinks: (heads,) the sink of each query head; None without sinks.

        Returns:
            (B, S, heads, D'), and from eager attention the probabilities (B, heads, S, S').
        """
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.extras,
            **({} if sinks is None else {"s_aux": sinks}),
            **kwargs,
        )
