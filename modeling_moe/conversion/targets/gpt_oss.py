# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module exports to gpt-oss.

The family always has attention sinks and biases of attention, router and experts. A model without them gets biases of zeros,
and sinks that take no share of the softmax.
"""

from typing import Any

import torch

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from .base import Target
from .parts import balance, filled, scaled, sparse_layers, window, with_attention_biases


# exp(SINK - logit) is 0 in every float dtype, and SINK itself is finite in all of them
SINK = -10_000.0
# transformers' class cannot be without a window; gpt-oss's own is written where no layer has one
UNUSED_WINDOW = 128


def _gpt_oss(config: MoEConfig) -> dict[str, Any]:
    # a model with other experts gets the family's default, which the comparison names
    clamp = {} if config.swiglu_limit is None else {"swiglu_limit": config.swiglu_limit}
    return (
        balance(config)
        | clamp
        | {
            "hidden_act": "silu",  # the family's experts do not read it
            "swiglu_alpha": config.swiglu_alpha,
            "num_local_experts": config.num_experts,
            "intermediate_size": config.moe_intermediate_size,
            "head_dim": config.head_dim,
            "attention_bias": True,
            "layer_types": config.layer_types,
            "sliding_window": window(config) or UNUSED_WINDOW,
        }
    )


def _gpt_oss_absorbed(config: MoEConfig) -> dict[str, Any]:
    added = ("attention_sinks", "attention_bias", "mlp_bias", "router_bias")
    return dict.fromkeys(added, True) | {"routed_scaling_factor": 1.0}


def _alternating(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns (H, 2I), whose columns are a row of `gate` (I, H), a row of `up` (I, H), and so on."""
    return torch.stack([gate, up], dim=1).flatten(0, 1).T


def _alternating_bias(bias: torch.Tensor) -> torch.Tensor:
    """Reorders biases (E, 2I) from all gates, then all ups, to alternating ones."""
    return torch.stack(bias.chunk(2, dim=1), dim=2).flatten(1)


def _biases(state: State, config: MoEConfig, layer: int) -> State:
    """Returns the experts' and the router's biases of a layer; a bias that the model lacks is zeros."""
    mlp, experts, width = f"model.layers.{layer}.mlp", config.num_experts, config.moe_intermediate_size
    dtype = state[f"{mlp}.experts.0.down_proj.weight"].dtype
    zeros = {
        f"{mlp}.experts.gate_up_proj_bias": filled(experts, 2 * width, dtype=dtype),
        f"{mlp}.experts.down_proj_bias": filled(experts, config.hidden_size, dtype=dtype),
        f"{mlp}.gate.bias": filled(experts, dtype=state[f"{mlp}.gate.weight"].dtype),
    }
    return {name: state.get(name, zero) for name, zero in zeros.items()}


def _gpt_oss_tensors(state: State, config: MoEConfig) -> State:
    """Fuses experts, whose gate and up rows alternate in the family, and adds the parts that the model lacks."""
    factor = config.routed_scaling_factor
    result = with_attention_biases(scaled(state, config), config, "qkvo")
    for layer in range(config.num_hidden_layers):
        sinks = f"model.layers.{layer}.self_attn.sinks"
        dtype = state[f"model.layers.{layer}.self_attn.q_proj.weight"].dtype
        result.setdefault(sinks, filled(config.num_attention_heads, dtype=dtype, value=SINK))
    for layer in sparse_layers(config):
        prefix = f"model.layers.{layer}.mlp"
        gates, ups, downs = (
            [result.pop(f"{prefix}.experts.{expert}.{part}_proj.weight") for expert in range(config.num_experts)]
            for part in ("gate", "up", "down")
        )
        shape = (config.hidden_size, 2 * config.moe_intermediate_size)
        result[f"{prefix}.experts.gate_up_proj"] = LazyTensor.stack(
            [LazyTensor.combine(_alternating, gate, up, shape=shape) for gate, up in zip(gates, ups, strict=True)]
        )
        result[f"{prefix}.experts.down_proj"] = LazyTensor.stack([down.transpose() for down in downs])
        biases = _biases(state, config, layer)
        inner, outer = f"{prefix}.experts.gate_up_proj_bias", f"{prefix}.experts.down_proj_bias"
        biases[inner] = biases[inner].map(_alternating_bias)
        if factor != 1:
            biases[outer] = biases[outer].map(lambda bias: bias * factor)
        result |= biases
    return {name.replace(".mlp.gate.", ".mlp.router."): tensor for name, tensor in result.items()}


GPT_OSS = Target("gpt_oss", _gpt_oss, _gpt_oss_tensors, _gpt_oss_absorbed)
