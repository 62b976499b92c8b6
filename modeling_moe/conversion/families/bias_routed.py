# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps families that route as DeepSeek-V3 does, by sigmoid and a correction bias, but differ in other parts."""

from typing import Any

from ...checkpoints import State
from ...configuration_moe import MoEConfig
from .base import Family, SourceFields, split_qkv
from .deepseek import deepseek_sparse, latent_attention, latent_tensors
from .sparse_parts import moe_tensors, shared_expert, sigmoid_routed, sigmoid_scores, sparse


# part of a tensor's name in Sarvam's checkpoints -> part of the name in a MoE
SARVAM_NAMES = {
    "model.word_embeddings.": "model.embed_tokens.",
    ".attention.": ".self_attn.",
    ".self_attn.dense.": ".self_attn.o_proj.",
    ".self_attn.query_layernorm.": ".self_attn.q_norm.",
    ".self_attn.key_layernorm.": ".self_attn.k_norm.",
}


def _dots1(fields: SourceFields) -> dict[str, Any]:
    # transformers' configuration has already merged this field into layer_types
    fields.take("max_window_layers")
    window = fields.same("head_dim", "sliding_window", "layer_types")
    return deepseek_sparse(fields) | sigmoid_routed(fields) | window | {"qk_norm": "head"}


def _glm4_moe(fields: SourceFields) -> dict[str, Any]:
    values = deepseek_sparse(fields, partial=True) | sigmoid_routed(fields) | fields.same("head_dim")
    # the output projection has no bias
    bias = values.pop("attention_bias")
    return values | {"qkv_bias": bias, "qk_norm": "head" if fields.take("use_qk_norm") else None}


def _solar_open(fields: SourceFields) -> dict[str, Any]:
    # transformers' model does not have these features, which a config.json can name
    fields.require("use_qk_norm", False)
    fields.require("first_k_dense_replace", 0)
    values = deepseek_sparse(fields) | sigmoid_routed(fields) | fields.same("head_dim")
    bias = values.pop("attention_bias")
    return values | {"qkv_bias": bias}


def _latent(fields: SourceFields) -> dict[str, Any]:
    fields.require("rope_interleave", True)
    return deepseek_sparse(fields) | latent_attention(fields) | sigmoid_routed(fields)


def _kinds_of_layers(fields: SourceFields) -> dict[str, Any]:
    """Reads `mlp_layer_types`, beside which transformers' model ignores the number of dense layers at the start."""
    kinds = fields.take("mlp_layer_types")
    fields.require("first_k_dense_replace", next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds)))
    return {"mlp_layer_types": kinds}


def _glm4_moe_lite(fields: SourceFields) -> dict[str, Any]:
    return _latent(fields) | _kinds_of_layers(fields)


def _exaone_moe(fields: SourceFields) -> dict[str, Any]:
    # transformers' configuration has already merged these two into mlp_layer_types and layer_types
    fields.same("first_k_dense_replace", "sliding_window_pattern")
    same = fields.same("head_dim", "moe_intermediate_size", "num_shared_experts", "mlp_layer_types")
    window = fields.same("sliding_window", "layer_types")
    # only layers with a window rotate
    window["no_rope_layers"] = [int(kind == "sliding_attention") for kind in window["layer_types"]]
    return sparse(fields) | sigmoid_routed(fields) | same | window | {"qk_norm": "head"}


def _hy_v3(fields: SourceFields) -> dict[str, Any]:
    # the experts of this family have no biases, so that mlp_bias means another thing than in a MoE
    fields.require("mlp_bias", False)
    # a sum in fp32 that is rounded once equals a sum in half precision
    fields.take("enable_moe_fp32_combine")
    same = fields.same("head_dim", "moe_intermediate_size", "num_shared_experts", "attention_bias")
    router = {"norm_topk_prob": True, "routed_scaling_factor": fields.take("router_scaling_factor")}
    if same["num_shared_experts"] == 0:
        # transformers' model then has one shared expert of the width of dense layers
        same |= shared_expert(fields, "intermediate_size")
    values = sparse(fields) | same | _kinds_of_layers(fields) | sigmoid_scores(fields)
    return values | router | {"qk_norm": "head"}


def _minimax_m2(fields: SourceFields) -> dict[str, Any]:
    values = sparse(fields, partial=True) | sigmoid_scores(fields) | {"norm_topk_prob": True, "qk_norm": "full"}
    values |= fields.same("head_dim", "router_aux_loss_coef", "router_jitter_noise")
    # transformers 5.17 ignores the name that the published checkpoints give to the number of rotated features
    if (rotated := fields.take("rotary_dim")) is not None:
        factor = rotated / values["head_dim"]
        values["rope_parameters"] = {"partial_rotary_factor": factor} | values["rope_parameters"]
    return values


def _sarvam_moe_tensors(state: State, config: MoEConfig) -> State:
    """Splits the fused rows of queries, keys and values, and applies [`moe_tensors`]."""
    tensors: State = {}
    for name, tensor in state.items():
        for old, new in SARVAM_NAMES.items():
            name = name.replace(old, new)
        if ".query_key_value." in name:
            tensors |= split_qkv(name, "query_key_value", tensor, config)
        else:
            tensors[name] = tensor
    return moe_tensors(tensors, config)


BIAS_ROUTED_FAMILIES: dict[str, Family] = {
    "dots1": Family(_dots1, moe_tensors, sparse=True),
    "glm4_moe": Family(_glm4_moe, moe_tensors, sparse=True),
    "glm4_moe_lite": Family(_glm4_moe_lite, latent_tensors, sparse=True),
    "sarvam_moe": Family(_glm4_moe, _sarvam_moe_tensors, sparse=True),
    "sarvam_mla": Family(_latent, latent_tensors, sparse=True),
    "solar_open": Family(_solar_open, moe_tensors, sparse=True),
    "exaone_moe": Family(_exaone_moe, moe_tensors, sparse=True),
    "hy_v3": Family(_hy_v3, moe_tensors, sparse=True),
    "minimax_m2": Family(_minimax_m2, moe_tensors, sparse=True),
}
