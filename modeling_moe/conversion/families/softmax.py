# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps Mixtral and the families that route by softmax as it does to a MoE."""

from typing import Any

from ...utils.errors import UserError
from .base import Family, SourceFields
from .sparse_parts import moe_tensors, standard


def _mixtral(fields: SourceFields) -> dict[str, Any]:
    return standard(fields) | fields.same("router_jitter_noise", "sliding_window") | {"norm_topk_prob": True}


def _qwen(fields: SourceFields) -> dict[str, Any]:
    dense, step = fields.take("mlp_only_layers") or [], fields.take("decoder_sparse_step", 1)
    layers = range(fields.take("num_hidden_layers"))
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
        "mlp_layer_types": ["dense" if i in dense or (i + 1) % step else "sparse" for i in layers],
    }


def _qwen2_moe(fields: SourceFields) -> dict[str, Any]:
    same = fields.same("qkv_bias", "layer_types", "shared_expert_intermediate_size")
    return _qwen(fields) | same | {"num_shared_experts": 1, "shared_expert_gate": True}


def _qwen3_moe(fields: SourceFields) -> dict[str, Any]:
    return _qwen(fields) | fields.same("attention_bias") | {"qk_norm": "head"}


def _olmoe(fields: SourceFields) -> dict[str, Any]:
    return standard(fields) | fields.same("attention_bias", "clip_qkv", "norm_topk_prob") | {"qk_norm": "full"}


SOFTMAX_FAMILIES: dict[str, Family] = {
    "mixtral": Family(_mixtral, moe_tensors, sparse=True),
    "qwen2_moe": Family(_qwen2_moe, moe_tensors, sparse=True),
    "qwen3_moe": Family(_qwen3_moe, moe_tensors, sparse=True),
    "olmoe": Family(_olmoe, moe_tensors, sparse=True),
}
