# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What each of transformers' model families calls the switches of a [`MoEConfig`]."""

from typing import Any

from transformers import PreTrainedConfig

from ..cli import UserError
from ..configuration_moe import MoEConfig


COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
# the coefficient is kept as it stands, though transformers' loss is K times ours; a z-loss they do not have
SPARSE = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")


def _dense(source) -> dict[str, Any]:
    return {"mlp_layer_types": ["dense"] * source.num_hidden_layers}


def _sparse(source) -> dict[str, Any]:
    return {name: getattr(source, name) for name in SPARSE} | {"router_z_loss_coef": 0.0}


def _qwen_sparse(source) -> dict[str, Any]:
    def is_sparse(layer: int) -> bool:
        return layer not in source.mlp_only_layers and (layer + 1) % source.decoder_sparse_step == 0

    return _sparse(source) | {
        "moe_intermediate_size": source.moe_intermediate_size,
        "norm_topk_prob": source.norm_topk_prob,
        "mlp_layer_types": ["sparse" if is_sparse(i) else "dense" for i in range(source.num_hidden_layers)],
    }


def _llama(source) -> dict[str, Any]:
    return _dense(source) | {"attention_bias": source.attention_bias, "mlp_bias": source.mlp_bias}


def _mistral(source) -> dict[str, Any]:
    return _dense(source) | {"sliding_window": source.sliding_window}


def _qwen2(source) -> dict[str, Any]:
    window = {"sliding_window": source.sliding_window, "layer_types": source.layer_types}
    return _dense(source) | {"qkv_bias": True} | window


def _qwen3(source) -> dict[str, Any]:
    window = {"sliding_window": source.sliding_window, "layer_types": source.layer_types}
    return _dense(source) | {"attention_bias": source.attention_bias, "qk_norm": "head"} | window


def _mixtral(source) -> dict[str, Any]:
    return _sparse(source) | {
        "router_jitter_noise": source.router_jitter_noise,
        "sliding_window": source.sliding_window,
    }


def _qwen2_moe(source) -> dict[str, Any]:
    return _qwen_sparse(source) | {
        "qkv_bias": source.qkv_bias,
        "sliding_window": source.sliding_window or None,
        "layer_types": source.layer_types,
        "num_shared_experts": 1,
        "shared_expert_intermediate_size": source.shared_expert_intermediate_size,
        "shared_expert_gate": True,
    }


def _qwen3_moe(source) -> dict[str, Any]:
    return _qwen_sparse(source) | {
        "attention_bias": source.attention_bias,
        "qk_norm": "head",
        "sliding_window": source.sliding_window,
    }


def _olmoe(source) -> dict[str, Any]:
    return _sparse(source) | {
        "attention_bias": source.attention_bias,
        "clip_qkv": source.clip_qkv,
        "norm_topk_prob": source.norm_topk_prob,
        "qk_norm": "full",
    }


DENSE_FAMILIES = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}
SPARSE_FAMILIES = {"mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe}
FAMILIES = DENSE_FAMILIES | SPARSE_FAMILIES


def moe_config(source: PreTrainedConfig) -> MoEConfig:
    """The configuration under which a [`MoEForCausalLM`] computes what the source model does.

    Args:
        source: configuration of one of `FAMILIES`; dense ones become a MoE whose layers are all dense.

    Raises:
        UserError: if the family is another one.
    """
    if source.model_type not in FAMILIES:
        raise UserError(
            f"model_type {source.model_type!r} has no conversion: it must be one of {', '.join(sorted(FAMILIES))}"
        )
    fields = {name: getattr(source, name) for name in COMMON}
    fields["head_dim"] = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    return MoEConfig(**fields, **FAMILIES[source.model_type](source))
