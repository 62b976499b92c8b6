# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module exports to the families that route by softmax: Mixtral, Granite, Qwen-MoE and OLMoE."""

from typing import Any

import torch

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from .base import Target
from .parts import (
    balance,
    filled,
    mixtral_names,
    scaled,
    sparse_layers,
    window,
    with_attention_biases,
    with_shared_experts,
)


# width of a shared expert of zeros: llama.cpp replaces a width of 0 by another one, and 256 is divisible by any usual number
# of processes and any block of quantised weights
ZERO_WIDTH = 256


def _mixtral(config: MoEConfig) -> dict[str, Any]:
    return balance(config) | {
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "sliding_window": window(config),
        "router_jitter_noise": float(config.router_jitter_noise),
    }


def _mixtral_tensors(state: State, config: MoEConfig) -> State:
    return mixtral_names(scaled(state, config))


def _granitemoeshared(config: MoEConfig) -> dict[str, Any]:
    multiplier = config.attention_multiplier
    # the family's class declares no head_dim, but its attention reads one
    usual = config.head_dim == config.hidden_size // config.num_attention_heads
    return (
        balance(config)
        | ({} if usual else {"head_dim": config.head_dim})
        | {
            "num_local_experts": config.num_experts,
            "intermediate_size": config.moe_intermediate_size,
            "shared_intermediate_size": config.shared_expert_intermediate_size,
            "attention_bias": config.attention_bias,
            "attention_multiplier": config.head_dim**-0.5 if multiplier is None else multiplier,
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.logits_scaling,
        }
    )


def _granitemoeshared_tensors(state: State, config: MoEConfig) -> State:
    """Fuses experts, and the shared expert's gate and up projections, as Granite's checkpoints do."""
    result = scaled(state, config)
    for layer in sparse_layers(config):
        prefix = f"model.layers.{layer}"
        experts = [
            {part: result.pop(f"{prefix}.mlp.experts.{e}.{part}_proj.weight") for part in ("gate", "up", "down")}
            for e in range(config.num_experts)
        ]
        moe, shared = f"{prefix}.block_sparse_moe", f"{prefix}.mlp.shared_experts"
        inner = [LazyTensor.cat([expert["gate"], expert["up"]]) for expert in experts]
        result[f"{moe}.input_linear.weight"] = LazyTensor.stack(inner)
        result[f"{moe}.output_linear.weight"] = LazyTensor.stack([expert["down"] for expert in experts])
        result[f"{moe}.router.layer.weight"] = result.pop(f"{prefix}.mlp.gate.weight")
        if config.has_shared_experts:
            gate, up, down = (result.pop(f"{shared}.{part}_proj.weight") for part in ("gate", "up", "down"))
            result[f"{prefix}.shared_mlp.input_linear.weight"] = LazyTensor.cat([gate, up])
            result[f"{prefix}.shared_mlp.output_linear.weight"] = down
    return result


def _qwen(config: MoEConfig) -> dict[str, Any]:
    return balance(config) | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": config.mlp_only_layers,
        "use_sliding_window": window(config) is not None,
        "sliding_window": window(config),
    }


def _qwen3_moe(config: MoEConfig) -> dict[str, Any]:
    return _qwen(config) | {"head_dim": config.head_dim, "attention_bias": config.attention_bias}


def _qwen2_moe(config: MoEConfig) -> dict[str, Any]:
    return _qwen(config) | {
        "qkv_bias": True,
        "layer_types": config.layer_types,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size or ZERO_WIDTH,
    }


def _qwen2_moe_absorbed(config: MoEConfig) -> dict[str, Any]:
    return {
        "routed_scaling_factor": 1.0,
        "qkv_bias": True,
        "shared_expert_gate": True,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size or ZERO_WIDTH,
    }


def _qwen2_moe_tensors(state: State, config: MoEConfig) -> State:
    """Adds zeros for each part that Qwen2-MoE always has and the model lacks.

    These parts are: biases of query, key and value, which vLLM does not make optional; the shared expert; and the shared
    expert's gate. A gate of tiny numbers has the sigmoid 1/2, so the output of an ungated shared expert is doubled; for
    a gate of zeros llama.cpp, which computes the sigmoid as silu(x) / x, answers NaN.
    """
    result = with_attention_biases(scaled(state, config), config, "qkv")
    if not (config.has_shared_experts and config.shared_expert_gate):
        for layer in sparse_layers(config):
            mlp = f"model.layers.{layer}.mlp."
            dtype = state[f"model.layers.{layer}.self_attn.q_proj.weight"].dtype
            result[f"{mlp}shared_expert_gate.weight"] = filled(
                1, config.hidden_size, dtype=dtype, value=2.0**-24 if dtype == torch.float16 else 2.0**-64
            )
            if config.has_shared_experts:
                down = f"{mlp}shared_experts.down_proj.weight"
                result[down] = result[down].map(lambda weight: 2 * weight)
    result = with_shared_experts(result, config, config.shared_expert_intermediate_size or ZERO_WIDTH)
    return {name.replace(".shared_experts.", ".shared_expert."): tensor for name, tensor in result.items()}


def _olmoe(config: MoEConfig) -> dict[str, Any]:
    return balance(config) | {
        "num_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "attention_bias": config.attention_bias,
        "clip_qkv": config.clip_qkv,
        "norm_topk_prob": config.norm_topk_prob,
    }


MIXTRAL = Target("mixtral", _mixtral, _mixtral_tensors)
GRANITEMOESHARED = Target("granitemoeshared", _granitemoeshared, _granitemoeshared_tensors)
QWEN2_MOE = Target("qwen2_moe", _qwen2_moe, _qwen2_moe_tensors, _qwen2_moe_absorbed)
QWEN3_MOE = Target("qwen3_moe", _qwen3_moe, scaled)
OLMOE = Target("olmoe", _olmoe, scaled)
