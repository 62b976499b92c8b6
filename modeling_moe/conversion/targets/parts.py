# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds what the exports to several families share: fields, names, and parts that do not change the logits."""

import copy
import re
from typing import Any

import torch

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig


ROUTED = re.compile(r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def rope(config: MoEConfig) -> dict[str, Any]:
    """Returns the rotary embedding of a family that rotates whole heads, with one embedding for all layers.

    A model with other rotations gets a rotation that differs from its own, so that the comparison names `rope_parameters`.
    """
    parameters: dict[str, Any] = dict(copy.deepcopy(config.rope_parameters) or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        return {}
    if parameters.get("partial_rotary_factor") != 1.0:
        parameters.pop("partial_rotary_factor", None)
    return parameters


def partial_rope(config: MoEConfig) -> dict[str, Any]:
    """Returns the rotary embedding of a family that rotates a part of each head; the part is named even if it is all."""
    parameters = rope(config)
    return parameters and parameters | {
        "partial_rotary_factor": (config.rope_parameters or {}).get("partial_rotary_factor") or 1.0
    }


def window(config: MoEConfig) -> int | None:
    """Returns the sliding window, or None if no layer has one."""
    return config.sliding_window if "sliding_attention" in config.layer_types else None


def balance(config: MoEConfig) -> dict[str, Any]:
    """Returns the coefficient of the balance loss that most families have."""
    return {"router_aux_loss_coef": float(config.router_aux_loss_coef)}


def filled(*shape: int, dtype: torch.dtype, value: float = 0.0) -> LazyTensor:
    """Returns a tensor in which all numbers are equal."""
    return LazyTensor(shape, dtype, lambda index: torch.full(shape, value, dtype=dtype)[index])


def scaled(state: State, config: MoEConfig) -> State:
    """Returns a new state in which `routed_scaling_factor` is multiplied into the routed experts' `down_proj`."""
    factor = config.routed_scaling_factor
    if factor == 1:
        return dict(state)
    down = {name for name in state if (match := ROUTED.search(name)) and match[2] == "down"}
    return {
        name: tensor.map(lambda weight: weight * factor) if name in down else tensor for name, tensor in state.items()
    }


def mixtral_names(state: State) -> State:
    """Renames routers and experts as Mixtral's checkpoints name them."""

    def renamed(name: str) -> str:
        name = ROUTED.sub(lambda m: f".block_sparse_moe.experts.{m[1]}.{MIXTRAL_NAMES[m[2]]}.weight", name)
        return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")

    return {renamed(name): tensor for name, tensor in state.items()}


def sparse_layers(config: MoEConfig) -> list[int]:
    """Returns the indices of the sparse layers."""
    return [layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]


def with_attention_biases(state: State, config: MoEConfig, parts: str) -> State:
    """Adds biases of zeros to those projections of attention that have none.

    Args:
        state: tensors of a MoE checkpoint.
        config: its configuration.
        parts: letters of the projections, such as "qkv".
    """
    added: State = {}
    for layer in range(config.num_hidden_layers):
        for part in parts:
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            weight = state[f"{name}.weight"]
            added[f"{name}.bias"] = filled(weight.shape[0], dtype=weight.dtype)
    return added | state


def with_selection_bias(state: State, config: MoEConfig) -> State:
    """Adds a correction bias of zeros, in fp32, to routers that have none."""
    names = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in sparse_layers(config)]
    return {name: filled(config.num_experts, dtype=torch.float32) for name in names} | state


def with_shared_experts(state: State, config: MoEConfig, width: int) -> State:
    """Gives the shared experts of each sparse layer `width` hidden features, of which those added are zeros."""
    result, own = dict(state), config.shared_expert_intermediate_size
    if own == width:
        return result
    for layer in sparse_layers(config):
        prefix = f"model.layers.{layer}.mlp.shared_experts."
        dtype = state[f"model.layers.{layer}.self_attn.o_proj.weight"].dtype
        for part, shape in (
            ("gate", (width, config.hidden_size)),
            ("up", (width, config.hidden_size)),
            ("down", (config.hidden_size, width)),
        ):
            name = f"{prefix}{part}_proj.weight"
            if own == 0:
                result[name] = filled(*shape, dtype=dtype)
            else:
                result[name] = state[name].map(lambda weight, shape=shape: _padded(weight, shape), shape=shape)
    return result


def _padded(weight: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.pad(weight, (0, shape[1] - weight.shape[1], 0, shape[0] - weight.shape[0]))
