# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines multi-head attention of the Llama family, with the differences between its members as fields."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_attention_with_sinks
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_rope import scale_by_position
from .compatibility import one_cache, update_cache
from .configuration_fields import POSITIVE, PROBABILITY, Condition, Range, setting
from .model_norms import make_norm


# latent attention does not read the fields of plain attention
PLAIN = Condition(lambda config: config.kv_lora_rank is None, "unset kv_lora_rank (latent attention)")

# routed attention has no place for a gate on the output of each head
_UNROUTED = Condition(lambda config: config.routed_attention is None, "unset routed_attention")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class AttentionFields:
    """These fields configure attention."""

    num_attention_heads: int = setting(16, "The number of query heads in each layer.", Range(1, 2**16))
    num_key_value_heads: int = setting(
        None,
        "The number of key and value heads in each layer; it must divide the number of query heads.",
        Range(1, 2**16),
        conditions=(PLAIN,),
        follows="num_attention_heads",
    )
    head_dim: int = setting(
        None,
        "The number of features of one attention head; it must be even. In latent attention it equals qk_rope_head_dim.",
        Range(2, 2**20),
        conditions=(PLAIN,),
        follows="hidden_size / num_attention_heads",
    )
    attention_bias: bool = setting(
        False, "Adds biases to the query, key, value and output projections, as in Llama's attention_bias."
    )
    qkv_bias: bool = setting(
        False,
        "Adds biases to the query, key and value projections but not to the output projection, as in Qwen2.",
        conditions=(PLAIN, Condition(lambda config: not config.attention_bias, "set attention_bias=False")),
    )
    attention_output_bias: bool = setting(
        False,
        "Adds a bias to the output projection but not to the query, key and value projections, as in JetMoE.",
        conditions=(PLAIN, Condition(lambda config: not config.attention_bias, "set attention_bias=False")),
    )
    qk_norm: Literal["head", "full"] | None = setting(
        None,
        'Normalises queries and keys: "head" normalises each head (Qwen3), "full" normalises all heads together (OLMoE), '
        "None does not normalise them.",
        conditions=(PLAIN,),
    )
    qk_norm_after_rope: bool = setting(
        False,
        "Normalises the heads of queries and keys after their rotation instead of before it, as in Hunyuan.",
        conditions=(PLAIN, Condition(lambda config: config.qk_norm == "head", "set qk_norm='head'")),
    )
    attn_output_gate: bool = setting(
        False,
        "Multiplies the output of attention, before its last projection, by the sigmoid of a learned projection of the layer's "
        "input, feature by feature, as in AFMoE and Qwen3-Next (arXiv:2505.06708).",
        conditions=(PLAIN, _UNROUTED),
    )
    clip_qkv: float | int | None = setting(
        None, "Clamps queries, keys and values to [-clip_qkv, clip_qkv], as in OLMoE.", POSITIVE, conditions=(PLAIN,)
    )
    attention_dropout: float | int = setting(
        0.0, "The dropout probability of attention probabilities in training.", PROBABILITY, effect="training"
    )
    attention_multiplier: float | int | None = setting(
        None,
        "The factor on the products of queries and keys; None means 1 / sqrt(number of features of a query head).",
        POSITIVE,
    )
    llama_4_scaling_beta: float | int | None = setting(
        None,
        "Multiplies the query at position p by 1 + llama_4_scaling_beta * log(1 + floor(p / L)), L the "
        "original_max_position_embeddings of rope_parameters, as in Mistral 4; None multiplies by nothing.",
        POSITIVE,
        conditions=(
            Condition(
                lambda config: (config.rope_parameters or {}).get("original_max_position_embeddings") is not None,
                "give rope_parameters an original_max_position_embeddings",
            ),
        ),
    )
    scale_attn_by_inverse_layer_idx: bool = setting(
        False,
        "Divides the factor on the products of queries and keys by the layer's number, counted from 1, as in GPT-2.",
        conditions=(PLAIN,),
    )
    attn_logit_softcapping: float | int | None = setting(
        None,
        "Bounds the products of queries and keys by cap * tanh(product / cap), as in Gemma 2; the sdpa attention "
        "implementation cannot compute it.",
        POSITIVE,
        conditions=(PLAIN,),
    )
    attention_sinks: bool = setting(
        False,
        "Gives each head a learned logit that takes part in the softmax and attends to nothing, as in gpt-oss; the sdpa "
        "attention implementation cannot compute it.",
        conditions=(PLAIN,),
    )
    sliding_window: int | None = setting(
        None,
        "The number of tokens that a layer of type sliding_attention attends to, the current one included; at least one "
        "layer must have that type. A window of 1 is refused because transformers' cache keeps all tokens then.",
        Range(2, 2**31),
    )
    use_sliding_window: bool = setting(
        True, "False unsets sliding_window, as Qwen's field of this name does.", effect="detail"
    )
    layer_types: list[str] = setting(
        None,
        "The attention type of each layer: full_attention or sliding_attention.",
        choices=("full_attention", "sliding_attention"),
        follows="sliding_attention for all layers if sliding_window is set, else full_attention",
    )


class AttentionBase(nn.Module):
    """Base class of multi-head attention with queries, keys and values of one width D (`head_dim`).

    A subclass makes its query and output projections, and its forward calls the attention function.
    """

    # name of the routing inside attention, a key of `modeling_moe.attention_catalogue.ROUTED_ATTENTION`
    routed_attention: str | None = None

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.rotates = config.rotates(layer_idx)
        self.clip_qkv = config.clip_qkv
        self.scales_queries = config.llama_4_scaling_beta is not None
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.qkv_bias = config.attention_bias or config.qkv_bias
        self.output_bias = config.attention_bias or config.attention_output_bias
        keys = config.num_key_value_heads * self.head_dim
        self.add_queries(config)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=self.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=self.qkv_bias)
        self.add_output(config)
        self.norm_per_head, self.norm_after_rope = config.qk_norm == "head", config.qk_norm_after_rope
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm is not None:
            self.q_norm = make_norm(config, self.head_dim if self.norm_per_head else self.query_width(config))
            self.k_norm = make_norm(config, self.head_dim if self.norm_per_head else keys)
        # arguments that only some attention functions accept, given only if the model needs them
        self.extras = {}
        if config.attn_logit_softcapping is not None:
            self.extras["softcap"] = config.attn_logit_softcapping
        heads = self.query_width(config) // self.head_dim
        self.sinks = nn.Parameter(torch.empty(heads)) if config.attention_sinks else None
        self.eager: Callable = eager_attention_with_sinks if config.attention_sinks else eager_attention_forward

    def query_width(self, config: Any) -> int:
        """Returns the number of features that the query projection gives a token at once."""
        return config.num_attention_heads * config.head_dim

    def add_queries(self, config: Any) -> None:
        """Makes the query projection."""
        raise NotImplementedError

    def add_output(self, config: Any) -> None:
        """Makes the output projection."""
        raise NotImplementedError

    def init_weights(self, std: float) -> None:
        """Fills the sinks of a new model; transformers fills the projections."""
        if self.sinks is not None:
            init.normal_(self.sinks, mean=0.0, std=std)

    def query_heads(self, query: torch.Tensor) -> torch.Tensor:
        """Returns projected queries (B, S, width), or (B, S, heads, D), as (B, heads, S, D)."""
        return query.view(*query.shape[:2], -1, self.head_dim).transpose(1, 2)

    def heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Makes projections into what the attention function takes: normalised, rotated heads, with those in the cache.

        Args:
            query: (B, S, ..., width) projected queries, which `query_heads` makes into heads.
            key, value: (B, S, G * D) projected keys and values of G heads.
            position_embeddings, cache: those of [`MoEAttention.forward`].
            kwargs: keyword arguments that the attention function will get; a paged cache adds one.

        Returns:
            Queries (B, heads, S, D), and keys and values (B, G, S', D) of S' tokens.
        """
        if self.norm_per_head:
            query, key = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key))
        if not self.norm_after_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.clip_qkv is not None:
            query, key, value = (x.clamp(-self.clip_qkv, self.clip_qkv) for x in (query, key, value))
        query = self.query_heads(query)
        key, value = (x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in (key, value))

        if self.rotates:
            assert position_embeddings is not None  # the model computes them if any layer rotates
            partial = position_embeddings[0].shape[-1] < self.head_dim
            rotate = apply_partial_rotary_pos_emb if partial else apply_rotary_pos_emb
            query, key = (x.to(value.dtype) for x in rotate(query, key, *position_embeddings))
        if self.norm_after_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.scales_queries:
            query = scale_by_position(query, self.config, kwargs)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)
        return query, key, value


class MoEAttention(AttentionBase):
    """Multi-head attention in which all heads attend for every token."""

    def add_queries(self, config: Any) -> None:
        """Makes the query projection."""
        self.q_proj = nn.Linear(config.hidden_size, self.query_width(config), bias=self.qkv_bias)

    def add_output(self, config: Any) -> None:
        """Makes the output projection, and the gate before it."""
        queries = self.query_width(config)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=self.output_bias)
        self.gate_proj = nn.Linear(config.hidden_size, queries, bias=False) if config.attn_output_gate else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes attention over (B, S, H).

        Args:
            hidden_states: (B, S, H).
            position_embeddings: cosines and sines (B, S, rotated width); None in a model without rotary embedding.
            attention_mask: mask of transformers for the attention implementation.
            cache: key-value cache, which gets the new tokens' keys and values.

        Returns:
            Output (B, S, H), and from eager attention the probabilities (B, heads, S, S'), S' the number of keys.
        """
        cache = one_cache(self, cache, past_key_values)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key, value = self.heads(query, key, value, position_embeddings, cache, kwargs)
        # vLLM reads in the source of this method that it calls the attention function once
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.extras,
            **({} if self.sinks is None else {"s_aux": self.sinks}),
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if self.gate_proj is not None:
            attn_output = attn_output * torch.sigmoid(self.gate_proj(hidden_states))
        return self.o_proj(attn_output), attn_weights
