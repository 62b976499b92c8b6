# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines multi-head latent attention: keys and values of all heads come from one narrow latent per token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_rope import scale_by_position
from .compatibility import one_cache, update_cache
from .configuration_fields import Condition, Range, setting


_LATENT = Condition(lambda config: config.kv_lora_rank is not None, "set kv_lora_rank (latent attention)")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class LatentAttentionFields:
    """These fields configure multi-head latent attention."""

    kv_lora_rank: int | None = setting(
        None,
        "The number of features of the latent from which keys and values are computed; setting it switches multi-head "
        "latent attention on (DeepSeek-V2, arXiv:2405.04434). The rotary halves are not interleaved.",
        Range(1, 2**20),
    )
    q_lora_rank: int | None = setting(
        None,
        "The number of features of the latent from which latent attention computes queries; None computes queries from the "
        "hidden states directly.",
        Range(1, 2**20),
        effect="detail",
        conditions=(_LATENT,),
    )
    qk_nope_head_dim: int | None = setting(
        None,
        "The number of features of a query or key head that do not rotate, in latent attention.",
        Range(1, 2**20),
        effect="detail",
        conditions=(_LATENT,),
    )
    qk_rope_head_dim: int | None = setting(
        None,
        "The number of features of a query or key head that rotate, in latent attention; it must be even.",
        Range(2, 2**20),
        effect="detail",
        conditions=(_LATENT,),
    )
    v_head_dim: int | None = setting(
        None,
        "The number of features of a value head, in latent attention.",
        Range(1, 2**20),
        effect="detail",
        conditions=(_LATENT,),
    )


class MoELatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437).

    The parameters are DeepSeek's. `kv_a_proj_with_mqa` computes the latent of a token, then the rotated part of the key,
    which all heads share. `kv_b_proj` computes, head by head, the other part of the key, then the value. A query head is the
    unrotated part, then the rotated part. The two halves of a rotated part are rotated together, as in Llama; DeepSeek's
    checkpoints rotate pairs, so that row `i` of the first half is DeepSeek's row `2i`, and of the second half `2i + 1`.

    The cache holds the latents (B, 1, S, kv_lora_rank) and the rotated parts of the keys (B, 1, S, qk_rope_head_dim), 71
    times less than the keys and values of DeepSeek-V3. Decoding computes the keys and values of all earlier tokens again.
    """

    routed_attention: str | None = None

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scales_queries = config.llama_4_scaling_beta is not None
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.num_key_value_groups = 1
        multiplier = config.attention_multiplier
        self.scaling = self.qk_head_dim**-0.5 if multiplier is None else multiplier
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.q_proj = None
        # the norms of latents have the epsilon 1e-6, whatever `rms_norm_eps` is
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = LlamaRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=bias)

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the queries (B, heads, S, qk_head_dim) of hidden states (B, S, H), before rotation."""
        if self.q_proj is not None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return query.view(*hidden_states.shape[:-1], -1, self.qk_head_dim).transpose(1, 2)

    def _keys_and_values(self, latent: torch.Tensor, key_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys (B, heads, S, qk_head_dim) and values (B, heads, S, v_head_dim).

        Args:
            latent: (B, 1, S, kv_lora_rank).
            key_rot: (B, 1, S, qk_rope_head_dim) rotated part of the keys.
        """
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        key_value = self.kv_b_proj(latent[:, 0]).view(*latent.shape[:1], latent.shape[2], -1, sum(widths))
        key, value = key_value.transpose(1, 2).split(widths, dim=-1)
        return torch.cat((key, key_rot.expand(*key.shape[:-1], self.qk_rope_head_dim)), dim=-1), value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes attention over (B, S, H).

        Args:
            hidden_states: (B, S, H).
            position_embeddings: cosines and sines, (B, S, qk_rope_head_dim) each.
            attention_mask: mask of transformers for the attention implementation.
            cache: key-value cache, which gets the new tokens' latents and rotated parts of the keys.

        Returns:
            Output (B, S, H), and from eager attention the probabilities (B, heads, S, S'), S' the number of keys.
        """
        cache = one_cache(self, cache, past_key_values)
        rope = self.qk_rope_head_dim
        query, query_rot = self._queries(hidden_states).split([self.qk_nope_head_dim, rope], dim=-1)
        latent, key_rot = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split([self.kv_lora_rank, rope], dim=-1)
        latent = self.kv_a_layernorm(latent)
        query_rot, key_rot = apply_rotary_pos_emb(query_rot, key_rot, *position_embeddings)
        query = torch.cat((query, query_rot), dim=-1)
        if self.scales_queries:
            query = scale_by_position(query, self.config, kwargs)
        if cache is not None:
            latent, key_rot = update_cache(cache, latent, key_rot, self.layer_idx, kwargs)
        key, value = self._keys_and_values(latent, key_rot)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
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
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()), attn_weights
