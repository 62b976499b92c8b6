# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts the parameters of a model from its configuration, without making the model."""

import functools
from typing import Any

import torch
from transformers.activations import ACT2FN

from .attention_catalogue import attention_class
from .model_experts import StackedExperts
from .model_norms import norm_names
from .router import Router
from .router_catalogue import router_class


@functools.lru_cache
def _activation_params(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ACT2FN[name].parameters())


def _mlp_params(config: Any, width: int, gated: bool, features: int | None = None) -> int:
    """Returns the parameters of a network from `features` (by default H) to `width` and back, without its activation."""
    features = features or config.hidden_size
    weights = features * width * (3 if gated else 2)
    return weights + config.mlp_bias * (width * (2 if gated else 1) + features)


def _norm_params(config: Any, width: int | None = None) -> int:
    return (config.hidden_size if width is None else width) * (
        2 if config.norm_type == "layer" and config.norm_bias else 1
    )


def _latent_attention_params(config: Any) -> int:
    heads, hidden = config.num_attention_heads, config.hidden_size
    latents = config.kv_lora_rank + (config.q_lora_rank or 0)
    queries = heads * config.qk_head_dim * (config.q_lora_rank or hidden)
    keys = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    compressions = hidden * (latents + config.qk_rope_head_dim) + latents
    biases = (latents + config.qk_rope_head_dim + hidden) * config.attention_bias
    return queries + keys + compressions + biases + heads * config.v_head_dim * hidden


def _routed_attention_params(config: Any, experts: int) -> int:
    """Returns the parameters of routed attention that had `experts` experts, and a router for all; it makes one layer of it."""
    with torch.device("meta"):
        attention = attention_class(config)(config, 0)
    params = sum(parameter.numel() for parameter in attention.parameters())
    stacked = sum(
        parameter.numel()
        for module in attention.modules()
        if isinstance(module, StackedExperts)
        for parameter in module.parameters()
    )
    return params - stacked + stacked // config.attention_experts * experts


def _attention_params(config: Any, experts: int) -> int:
    """Returns the parameters of one layer's attention, with `experts` experts where attention is routed."""
    if config.routed_attention is not None:
        return _routed_attention_params(config, experts)
    if config.kv_lora_rank is not None:
        return _latent_attention_params(config)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    params = 2 * config.hidden_size * (queries + keys)
    if config.attention_bias or config.qkv_bias:
        params += queries + 2 * keys
    if config.attention_bias or config.attention_output_bias:
        params += config.hidden_size
    if config.attn_output_gate:
        params += config.hidden_size * queries
    if config.attention_sinks:
        params += config.num_attention_heads
    norms = {None: (), "head": (config.head_dim, config.head_dim), "full": (queries, keys)}[config.qk_norm]
    return params + sum(_norm_params(config, width) for width in norms)


def _router_params(config: Any) -> list[int]:
    """Returns the parameters of each layer's router, 0 in a dense layer; it makes one router of each kind."""
    sparse = [index for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    classes = [router_class(config, index) for index in sparse]
    params, sizes = [0] * config.num_hidden_layers, {}
    for place, (index, router) in enumerate(zip(sparse, classes, strict=True)):
        # a router that reads the layer before has fewer parameters where there is none
        kind = (router, router.carries and router not in classes[:place])
        if kind not in sizes:
            sizes[kind] = _router_size(router, config, index)
        params[index] = sizes[kind]
    return params


def _router_size(router: type[Router], config: Any, layer_idx: int) -> int:
    """Returns the parameters of one router, which it makes without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in router(config, layer_idx).parameters())


def _depth_router_params(config: Any, layer_idx: int) -> int:
    """Returns the parameters of the router that chooses the tokens of one layer."""
    return _router_size(router_class(config.depth_routing), config.depth_routing, layer_idx)


def count_params(config: Any) -> int:
    """Returns the number of parameters of a causal language model; a tied head counts once."""
    return _params_with(config, config.num_experts, config.attention_experts)


def count_active_params(config: Any) -> int:
    """Returns the number of parameters that one token uses: all but the routed experts that it is not sent to.

    A layer that processes the share `depth_capacity` of the tokens counts with that share, rounded.
    """
    experts = min(config.num_experts_per_tok, config.num_experts)
    return _params_with(config, experts, config.attention_experts_per_tok, config.depth_capacity)


def _params_with(config: Any, experts: int, attention_experts: int, depth: float = 1) -> int:
    """Returns the parameters of a causal language model that had so many experts per layer, and routers for all.

    Args:
        config: the model's configuration.
        experts: number of experts of a sparse layer.
        attention_experts: number of experts of routed attention.
        depth: factor on the parameters of a layer with a 1 in `depth_layers`, the layer's router excluded.
    """
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    embeddings += config.vocab_size * config.lm_head_bias
    if config.position_embedding_type == "learned":
        embeddings += config.max_position_embeddings * config.hidden_size
    layers = 0
    for index, params in enumerate(_layer_params(config, experts, attention_experts)):
        layers += round(depth * params) + _depth_router_params(config, index) if config.routes_depth(index) else params
    return embeddings + layers + _norm_params(config)


def _layer_params(config: Any, experts: int, attention_experts: int) -> list[int]:
    """Returns the parameters of each layer that had so many experts, without a router of depth."""
    activation = _activation_params(config.hidden_act)
    dense = _mlp_params(config, config.intermediate_size, config.gated_mlp) + activation
    expert = _mlp_params(config, config.moe_intermediate_size, config.gated_experts, config.moe_latent_size)
    sparse = experts * expert + activation
    if config.moe_latent_size is not None:
        sparse += _mlp_params(config, config.moe_latent_size, gated=False)  # the two projections around the experts
    if config.has_shared_experts:
        sparse += _mlp_params(config, config.shared_expert_intermediate_size, config.gated_experts) + activation
        sparse += config.shared_expert_gate * config.hidden_size
    sparse += config.moe_output_bias * config.hidden_size
    networks, attention = {"dense": dense, "sparse": sparse}, _attention_params(config, attention_experts)
    return [
        attention
        + networks[kind]
        + router
        + len(set(norm_names(config, kind == "sparse")) - {None}) * _norm_params(config)
        for kind, router in zip(config.mlp_layer_types, _router_params(config), strict=True)
    ]
