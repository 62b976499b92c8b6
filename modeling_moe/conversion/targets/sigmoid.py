# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module exports to the families that route by sigmoid scores with a correction bias: DeepSeek-V3, GLM-4 and MiniMax-M2.

A model without the bias gets one of zeros. DeepSeek-V3 and GLM-4 always have shared experts, and a model without them gets
experts of zeros.
"""

import math
from typing import Any

from ...checkpoints import State
from ...configuration_moe import MoEConfig
from ..families.sparse_parts import halves_to_pairs
from .base import Target
from .parts import (
    balance,
    mixtral_names,
    partial_rope,
    scaled,
    with_selection_bias,
    with_shared_experts,
)


def _shared_experts(config: MoEConfig) -> int:
    """Returns the number of shared experts of the routed experts' width that hold the model's shared experts."""
    return max(1, math.ceil(config.shared_expert_intermediate_size / config.moe_intermediate_size))


def _selection_bias(config: MoEConfig) -> dict[str, Any]:
    """Returns the bias of a sigmoid router as absorbed; a router with other scores is named by these scores."""
    return {"router_selection_bias": True}


def _deepseek_absorbed(config: MoEConfig) -> dict[str, Any]:
    width = _shared_experts(config) * config.moe_intermediate_size
    return _selection_bias(config) | {"shared_expert_intermediate_size": width}


def _deepseek_sparse(config: MoEConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": _shared_experts(config),
        "moe_intermediate_size": config.moe_intermediate_size,
        "first_k_dense_replace": config.first_k_dense_replace,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": float(config.routed_scaling_factor),
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        # the families' classes have a layer that predicts further tokens unless they are told otherwise
        "num_nextn_predict_layers": 0,
    }


def _deepseek_v3(config: MoEConfig) -> dict[str, Any]:
    latent = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    # a model without latent attention gets the family's default, which the comparison names
    widths = {} if config.kv_lora_rank is None else {name: getattr(config, name) for name in latent}
    loss = {"aux_loss_alpha": config.router_seq_aux_loss_coef} if config.router_seq_aux_loss_coef else {}
    return (
        _deepseek_sparse(config)
        | widths
        | loss
        | {
            "num_key_value_heads": config.num_attention_heads,
            "attention_bias": config.attention_bias,
            # transformers' class does not know these two: llama.cpp takes softmax without the first, and vLLM does not load a
            # checkpoint without the second
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
    )


def _deepseek_tensors(state: State, config: MoEConfig) -> State:
    width = _shared_experts(config) * config.moe_intermediate_size
    return with_shared_experts(with_selection_bias(state, config), config, width)


def _deepseek_v3_tensors(state: State, config: MoEConfig) -> State:
    """Adds the parts that the model lacks, and reorders the rotated rows of queries and keys from halves to pairs."""
    plain, rotated, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    if plain is None or rotated is None or rank is None:
        raise ValueError("kv_lora_rank must be set in a model that is exported as deepseek_v3.")
    query, key = halves_to_pairs(plain + rotated, plain), halves_to_pairs(rank + rotated, rank)
    reorder = {"q_proj": query, "q_b_proj": query, "kv_a_proj_with_mqa": key}
    tensors = {}
    for name, tensor in _deepseek_tensors(state, config).items():
        function = reorder.get(name.split(".")[-2]) if ".self_attn." in name else None
        tensors[name] = tensor if function is None else tensor.map(function)
    return tensors


def _glm4_moe(config: MoEConfig) -> dict[str, Any]:
    return _deepseek_sparse(config) | {
        "rope_parameters": partial_rope(config),
        "head_dim": config.head_dim,
        # the family's name for biases of query, key and value alone
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm == "head",
    }


def _minimax_m2(config: MoEConfig) -> dict[str, Any]:
    parameters = partial_rope(config)
    return balance(config) | {
        "rope_parameters": parameters,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "router_jitter_noise": float(config.router_jitter_noise),
        # transformers' class does not know these: vLLM and llama.cpp do not load a checkpoint without them
        "rotary_dim": int(config.head_dim * parameters.get("partial_rotary_factor", 1.0)),
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    }


def _minimax_m2_absorbed(config: MoEConfig) -> dict[str, Any]:
    return _selection_bias(config) | {"routed_scaling_factor": 1.0}


def _minimax_m2_tensors(state: State, config: MoEConfig) -> State:
    tensors = mixtral_names(with_selection_bias(scaled(state, config), config))
    return {
        name.replace(".gate.e_score_correction_bias", ".e_score_correction_bias"): t for name, t in tensors.items()
    }


DEEPSEEK_V3 = Target("deepseek_v3", _deepseek_v3, _deepseek_v3_tensors, _deepseek_absorbed)
GLM4_MOE = Target("glm4_moe", _glm4_moe, _deepseek_tensors, _deepseek_absorbed)
MINIMAX_M2 = Target("minimax_m2", _minimax_m2, _minimax_m2_tensors, _minimax_m2_absorbed)
