# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the decoder layer: attention, a feed-forward network, and the norms around them."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_catalogue import attention_class
from .compatibility import one_cache
from .model_depth import DepthRouting, Updates
from .model_norms import make_norm, norm_names
from .router import RoutingContext
from .router_kinds import slots
from .router_losses import TokenWeights
from .router_statistics import LayerOutput, Statistics, pack


class MoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense or a sparse feed-forward network; the residual stream adds the output of each.

    `config.norm_placement` puts norms before attention and network, after them, or both; with `"parallel"` attention and
    network read one input, and with `"parallel_shared"` the output of one norm. A layer of `config.depth_layers` processes
    only the tokens that its router chooses ([`~modeling_moe.model_depth.DepthRouting`]).

    Args:
        config: the model's configuration.
        layer_idx: index of the layer.
        mlp: the layer's feed-forward network, `MoEBlock` or [`~modeling_moe.model_mlp.MoEMLP`].
    """

    def __init__(self, config: Any, layer_idx: int, mlp: nn.Module):
        super().__init__()
        self.is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.self_attn = attention_class(config)(config, layer_idx)
        self.depth = DepthRouting(config, layer_idx) if config.routes_depth(layer_idx) else None
        self.slots = slots(config)
        self.mlp = mlp
        self.parallel = config.norm_placement == "parallel"
        self.shares_norm = config.norm_placement == "parallel_shared"
        self.norm_names = norm_names(config, self.is_sparse)
        for name in dict.fromkeys(self.norm_names):
            if name is not None:
                setattr(self, name, make_norm(config))
        self.resid_pdrop, self.residual_multiplier = config.resid_pdrop, config.residual_multiplier

    def forward(
        self,
        hidden_states: torch.Tensor,
        carried: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        routing_context: RoutingContext | None = None,
        token_weights: TokenWeights | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, ...]:
        """Maps (B, S, H) to (B, S, H), in the tuple that [`~modeling_moe.router_statistics.unpack`] reads.

        `carried` (T, N) is what the router of the sparse layer before has passed on. It is an argument by position, because
        reentrant checkpointing differentiates these alone.
        """
        cache = one_cache(self, cache, past_key_values)
        # the cache is the layer's argument: gradient checkpointing removes it from there
        context = (routing_context or RoutingContext(len(hidden_states)))._replace(cache=cache, carried=carried)
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        if self.depth is not None:
            return pack(self.depth(self._updates, hidden_states, context, token_weights, arguments), self.slots)
        updates = self._updates(hidden_states, context, token_weights, arguments)
        # in the order of transformers' models, since bf16 rounds each sum
        if updates.residual is None:  # as in GPT-NeoX
            output = (updates.network + updates.attended) + hidden_states
        else:
            output = updates.residual + updates.network
        return pack(LayerOutput(output, updates.carried, updates.statistics), self.slots)

    def _updates(
        self,
        hidden_states: torch.Tensor,
        context: RoutingContext,
        token_weights: TokenWeights | None,
        arguments: dict[str, Any],
    ) -> Updates:
        """Computes what attention and what the network add to (B, S, H)."""
        before_attention, after_attention, before_mlp, after_mlp = self.norm_names
        states = self._normed(before_attention, hidden_states)
        routed: dict[str, Any] = {}
        if self.self_attn.routed_attention is not None:
            routed = {"routing_context": context, "token_weights": token_weights}
        attended, _, *of_attention = self.self_attn(hidden_states=states, **routed, **arguments)
        attended = self._update(self._normed(after_attention, attended))
        statistics: Statistics = {"attention": of_attention[0]} if of_attention else {}
        carried = context.carried
        residual = None if self.parallel else hidden_states + attended
        if not self.shares_norm:
            states = self._normed(before_mlp, hidden_states if residual is None else residual)
        if self.is_sparse:
            states, of_mlp, carried = self.mlp(states, context, token_weights)
            if of_mlp is not None:
                statistics["mlp"] = [of_mlp]
        else:
            states = self.mlp(states)
        return Updates(attended, residual, self._update(self._normed(after_mlp, states)), carried, statistics)

    def _normed(self, name: str | None, states: torch.Tensor) -> torch.Tensor:
        return states if name is None else getattr(self, name)(states)

    def _update(self, states: torch.Tensor) -> torch.Tensor:
        """Returns what the residual stream adds: the output of attention or network after dropout and scaling."""
        if self.resid_pdrop:
            states = nn.functional.dropout(states, self.resid_pdrop, self.training)
        return states if self.residual_multiplier == 1.0 else states * self.residual_multiplier
