# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps Mixtral and the families that are built like it, with other attention or scores, to a MoE."""

from typing import Any

import torch

from ...checkpoints import State
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .base import Family, SourceFields
from .sparse_parts import moe_tensors, pairs_to_halves, renamed_tensors, shared_expert, standard


def _mixtral(fields: SourceFields) -> dict[str, Any]:
    return standard(fields) | fields.same("router_jitter_noise", "sliding_window") | {"norm_topk_prob": True}


def qwen_layers(fields: SourceFields) -> list[str]:
    """Returns for each layer whether it is dense or sparse, from Qwen's fields."""
    dense, step = fields.take("mlp_only_layers") or [], fields.take("decoder_sparse_step", 1)
    return ["dense" if i in dense or (i + 1) % step else "sparse" for i in range(fields.take("num_hidden_layers"))]


def _qwen(fields: SourceFields) -> dict[str, Any]:
    # transformers' configuration has already merged these two into sliding_window and layer_types
    fields.same("use_sliding_window", "max_window_layers")
    if fields.take("use_sliding_window") and fields.take("sliding_window") == 0:
        raise UserError(
            f"sliding_window is 0 in the config.json of this {fields.model_type} model: set use_sliding_window to false"
        )
    return standard(fields) | {
        "moe_intermediate_size": fields.take("moe_intermediate_size"),
        "norm_topk_prob": fields.take("norm_topk_prob"),
        "sliding_window": fields.take("sliding_window") or None,
        "mlp_layer_types": qwen_layers(fields),
    }


def _qwen2_moe(fields: SourceFields) -> dict[str, Any]:
    shared = shared_expert(fields)
    return _qwen(fields) | fields.same("qkv_bias", "layer_types") | shared | {"shared_expert_gate": bool(shared)}


def _qwen2_moe_tensors(state: State, config: MoEConfig) -> State:
    """Leaves out the gates of shared experts of width 0."""
    if config.num_shared_experts == 0:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".shared_expert_gate.weight")}
    return moe_tensors(state, config)


def _qwen3_moe(fields: SourceFields) -> dict[str, Any]:
    return _qwen(fields) | fields.same("attention_bias") | {"qk_norm": "head"}


def _olmoe(fields: SourceFields) -> dict[str, Any]:
    return standard(fields) | fields.same("attention_bias", "clip_qkv", "norm_topk_prob") | {"qk_norm": "full"}


def _flex_olmo(fields: SourceFields) -> dict[str, Any]:
    norms = {"norm_type": "rms_fp32", "norm_placement": "post", "qk_norm": "full", "rope_fp32": True}
    return standard(fields) | fields.same("attention_bias", "norm_topk_prob") | norms


def _mellum(fields: SourceFields) -> dict[str, Any]:
    layers = fields.same("attention_bias", "sliding_window", "layer_types", "mlp_layer_types")
    values = standard(fields) | layers | fields.same("moe_intermediate_size", "norm_topk_prob") | {"qk_norm": "head"}
    rope = fields.take("rope_parameters") or {}
    used = {kind: rope[kind] for kind in sorted(set(fields.take("layer_types"))) if kind in rope}
    return values | {"rope_parameters": used or rope}


def _flint(fields: SourceFields) -> dict[str, Any]:
    kinds = fields.take("layer_types")
    experts = ("moe_intermediate_size", "norm_topk_prob")
    return (
        standard(fields)
        | fields.same("attention_bias", "sliding_window", "layer_types", *experts)
        | shared_expert(fields)
        | {
            "scoring_func": "sigmoid",
            "norm_type": "rms_fp32",
            "qk_norm": "head",
            "attention_sinks": True,
            "no_rope_layers": [int(kind == "sliding_attention") for kind in kinds],
            "mlp_layer_types": qwen_layers(fields),
        }
    )


def _ernie4_5_moe(fields: SourceFields) -> dict[str, Any]:
    # the routed experts have no biases, which a MoE gives to all its networks or to none
    fields.require("use_bias", False, None)
    # a smaller sum of the chosen experts' weights would be raised to this value
    fields.require("moe_norm_min", 1e-12)
    first, last, step = (fields.take(f"moe_layer_{name}") for name in ("start_index", "end_index", "interval"))
    layers = range(fields.take("num_hidden_layers"))
    fields.same("moe_num_experts", "moe_k")
    return standard(fields) | {
        "moe_intermediate_size": fields.take("moe_intermediate_size"),
        "num_shared_experts": fields.take("moe_num_shared_experts"),
        "mlp_layer_types": ["sparse" if first <= i <= last and (i + 1) % step == 0 else "dense" for i in layers],
        "router_selection_bias": True,
        "norm_topk_prob": True,
        "rope_fp32": True,
    }


def _ernie4_5_tensors(state: State, config: MoEConfig) -> State:
    """Reorders the rows of queries and keys from interleaved pairs to halves, and takes the selection bias out of a row."""
    tensors, halves = {}, pairs_to_halves(config.head_dim, 0)
    for name, tensor in state.items():
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            tensor = tensor.map(halves)
        if ".moe_statics." in name:
            name = name.replace(".gate.moe_statics.", ".moe_statics.").replace(".moe_statics.", ".gate.")
            tensor = tensor[0].to(torch.float32)
        tensors[name] = tensor
    return moe_tensors(tensors, config)


SOFTMAX_FAMILIES: dict[str, Family] = {
    "mixtral": Family(_mixtral, moe_tensors, sparse=True),
    "qwen2_moe": Family(_qwen2_moe, _qwen2_moe_tensors, sparse=True),
    "qwen3_moe": Family(_qwen3_moe, moe_tensors, sparse=True),
    "olmoe": Family(_olmoe, moe_tensors, sparse=True),
    "flex_olmo": Family(_flex_olmo, moe_tensors, sparse=True),
    "mellum": Family(_mellum, moe_tensors, sparse=True),
    "flint": Family(_flint, renamed_tensors({".softmax_offset": ".sinks"}), sparse=True),
    "ernie4_5_moe": Family(_ernie4_5_moe, _ernie4_5_tensors, sparse=True),
}
