# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module exports to JetMoE, whose attention and feed-forward networks are both mixtures of experts."""

from typing import Any

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from ..families.jetmoe import KEYS_AND_VALUES, KINDS_OF_ROUTERS, NAMES
from .base import Target
from .parts import filled, scaled


# part of a layer -> projections of an expert before the last one, their name when fused, and the bias of the part's output
PARTS = {
    "self_attn": (("up_proj",), "up_proj", "o_bias"),
    "mlp": (("gate_proj", "up_proj"), "gate_up_proj", "output_bias.bias"),
}


def _jetmoe(config: MoEConfig) -> dict[str, Any]:
    final = config.final_norm_eps
    return {
        "num_local_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "kv_channels": config.head_dim,
        "activation_function": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps if final is None else final,
        "aux_loss_coef": float(config.router_aux_loss_coef) * KINDS_OF_ROUTERS,
    }


def _jetmoe_absorbed(config: MoEConfig) -> dict[str, Any]:
    return {"routed_scaling_factor": 1.0, "moe_output_bias": True, "attention_output_bias": True}


def _fused(state: State, config: MoEConfig, prefix: str) -> State:
    """Takes the experts of a part of a layer, such as "model.layers.0.mlp", out of `state`, and returns them fused.

    The result has the bias of the part's output too; a bias that the model lacks is zeros.
    """
    first, fused, bias = PARTS[prefix.rpartition(".")[2]]
    experts = [
        [state.pop(f"{prefix}.experts.{e}.{name}.weight") for name in (*first, "down_proj")]
        for e in range(config.num_experts)
    ]
    inner = LazyTensor.stack([LazyTensor.cat(rows) for *rows, _ in experts])
    return {
        f"{prefix}.experts.{fused}": inner,
        f"{prefix}.experts.down_proj": LazyTensor.stack([down for *_, down in experts]),
        f"{prefix}.{bias}": state.pop(f"{prefix}.{bias}", filled(config.hidden_size, dtype=inner.dtype)),
    }


def _jetmoe_tensors(state: State, config: MoEConfig) -> State:
    """Fuses experts, and keys with values, and gives all tensors JetMoE's names."""
    result = scaled(state, config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for part in PARTS:
            result |= _fused(result, config, f"{prefix}.{part}")
        keys, values = (result.pop(f"{prefix}.self_attn.{name}_proj.weight") for name in ("k", "v"))
        result[f"{prefix}{KEYS_AND_VALUES}weight"] = LazyTensor.cat([keys, values])
    return {_renamed(name): tensor for name, tensor in result.items()}


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(ours, theirs)
    return name


JETMOE = Target("jetmoe", _jetmoe, _jetmoe_tensors, _jetmoe_absorbed)
