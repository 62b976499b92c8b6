# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps the text models of multimodal families to a MoE; `wrappers` takes them out of the whole model."""

from typing import Any

from ...checkpoints import State
from ...configuration_moe import MoEConfig
from .base import Family, SourceFields
from .deepseek import deepseek_sparse, deepseek_v2_router
from .softmax import qwen_layers
from .sparse_parts import moe_tensors, sigmoid_routed, standard, unfused


# fields of rope_parameters that say which frequencies belong to which dimension of an image's positions
IMAGE_ROTATION = ("mrope_section", "mrope_interleaved", "interleaved")


def text_rotation(fields: SourceFields) -> dict[str, Any]:
    """Returns the rotation of texts, whose positions are equal in all dimensions of mrope."""
    rope = fields.take("rope_parameters") or {}
    return {"rope_parameters": {name: value for name, value in rope.items() if name not in IMAGE_ROTATION}}


def _aria_text(fields: SourceFields) -> dict[str, Any]:
    # the routed experts have no biases and always use silu, unlike the shared ones
    fields.require("mlp_bias", False)
    fields.require("hidden_act", "silu")
    return standard(fields) | {
        "num_experts": fields.take("moe_num_experts"),
        "num_experts_per_tok": fields.take("moe_topk"),
        "num_shared_experts": fields.take("moe_num_shared_experts"),
        "attention_bias": fields.take("attention_bias"),
        "norm_topk_prob": True,
        # transformers' model computes no balance loss
        "router_aux_loss_coef": 0.0,
    }


def _aria_tensors(state: State, config: MoEConfig) -> State:
    """Splits fused experts, which are transposed and have other names in checkpoints of older releases."""
    tensors: State = {}
    for name, tensor in state.items():
        name = name.replace(".fc1.weight", ".gate_up_proj").replace(".fc2.weight", ".down_proj")
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        tensors |= unfused(name, tensor, transposed=True) if fused else {name: tensor}
    return moe_tensors(tensors, config)


def _qwen3_omni_moe_text(fields: SourceFields) -> dict[str, Any]:
    # published configurations name features that the family does not have
    fields.require("shared_expert_intermediate_size", 0, None)
    fields.require("use_qk_norm", True, None)
    fields.require("use_sliding_window", False, None)
    fields.require("sliding_window", None)
    same = fields.same("attention_bias", "moe_intermediate_size", "norm_topk_prob")
    return (
        standard(fields) | same | text_rotation(fields) | {"qk_norm": "head", "mlp_layer_types": qwen_layers(fields)}
    )


def _qwen3_vl_moe_text(fields: SourceFields) -> dict[str, Any]:
    # the family always renormalises
    fields.require("norm_topk_prob", True, None)
    return _qwen3_omni_moe_text(fields) | {"norm_topk_prob": True}


def _qwen3_vl_moe_tensors(state: State, config: MoEConfig) -> State:
    """Splits fused experts, which are transposed in files; transformers tells the two layouts apart by the shape."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    tensors: State = {}
    for name, tensor in state.items():
        expected = shapes.get(name.rpartition(".experts.")[2])
        transposed = expected is not None and tensor.shape[1:] != expected
        tensors |= unfused(name, tensor, transposed=True) if transposed else {name: tensor}
    return moe_tensors(tensors, config)


def _glm4v_moe_text(fields: SourceFields) -> dict[str, Any]:
    # rope_parameters contains this field, which releases of transformers before 5.24 keep beside it
    fields.take("partial_rotary_factor")
    values = deepseek_sparse(fields, partial=True) | sigmoid_routed(fields)
    same = fields.same("head_dim", "router_aux_loss_coef")
    return values | {"qkv_bias": values.pop("attention_bias")} | same | text_rotation(fields)


def _deepseek_ocr2_text(fields: SourceFields) -> dict[str, Any]:
    fields.require("mlp_bias", False)
    fields.require("head_dim", fields.take("hidden_size") // fields.take("num_attention_heads"))
    return (
        standard(fields)
        | deepseek_v2_router(fields)
        | {
            "attention_bias": fields.take("attention_bias"),
            "moe_intermediate_size": fields.take("moe_intermediate_size"),
            "num_shared_experts": fields.take("n_shared_experts"),
            "mlp_layer_types": fields.take("mlp_layer_types"),
            # transformers' model computes no balance loss
            "router_aux_loss_coef": 0.0,
        }
    )


TEXT_FAMILIES: dict[str, Family] = {
    "aria_text": Family(_aria_text, _aria_tensors, sparse=True),
    "deepseek_ocr2_text": Family(_deepseek_ocr2_text, moe_tensors, sparse=True),
    "glm4v_moe_text": Family(_glm4v_moe_text, moe_tensors, sparse=True),
    "qwen3_omni_moe_text": Family(_qwen3_omni_moe_text, moe_tensors, sparse=True),
    "qwen3_vl_moe_text": Family(_qwen3_vl_moe_text, _qwen3_vl_moe_tensors, sparse=True),
}
