# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps gpt-oss to a MoE."""

from typing import Any

import torch

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from .base import Family, SourceFields
from .quantized import from_mxfp4
from .sparse_parts import moe_tensors, standard


def _gpt_oss(fields: SourceFields) -> dict[str, Any]:
    fields.require("hidden_act", "silu")
    fields.require_quantization("mxfp4")
    # these repeat num_experts_per_tok and a number in rope_parameters
    fields.require("experts_per_token", None, fields.take("num_experts_per_tok"))
    fields.take("initial_context_length")
    same = standard(fields) | fields.same("attention_bias", "sliding_window", "layer_types")
    return same | {
        "norm_type": "rms_fp32",
        "attention_sinks": True,
        "moe_intermediate_size": fields.take("intermediate_size"),
        "mlp_bias": True,
        # older releases of transformers have these two as constants in the model
        "swiglu_limit": fields.take("swiglu_limit", 7.0),
        "swiglu_alpha": fields.take("swiglu_alpha", 1.702),
        "router_bias": True,
        "norm_topk_prob": True,
    }


def _gpt_oss_experts(state: State, name: str) -> list[LazyTensor]:
    """Returns the experts' matrices (out, in) from the tensor `name` (E, in, out), or from mxfp4 blocks and scales."""
    tensor = state[name]
    if not name.endswith("_blocks"):
        return [tensor[expert].transpose() for expert in range(tensor.shape[0])]
    scales = state[f"{name.removesuffix('_blocks')}_scales"]
    experts, rows, groups, size = tensor.shape
    shape = (rows, 2 * groups * size)
    return [
        LazyTensor.combine(from_mxfp4, tensor[expert], scales[expert], shape=shape, dtype=torch.bfloat16)
        for expert in range(experts)
    ]


def _gpt_oss_tensors(state: State, config: MoEConfig) -> State:
    """Splits fused experts, and separates the rows of their gate and up projections, which alternate in the source."""
    tensors = {}
    for name, tensor in state.items():
        experts, _, kind = name.rpartition(".")
        if kind == "gate_up_proj_bias":
            tensors[name] = tensor.map(lambda rows: torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1))
        elif kind in ("gate_up_proj", "gate_up_proj_blocks"):
            for expert, matrix in enumerate(_gpt_oss_experts(state, name)):
                shape = (matrix.shape[0] // 2, matrix.shape[1])
                tensors[f"{experts}.{expert}.gate_proj.weight"] = matrix.map(lambda rows: rows[0::2], shape=shape)
                tensors[f"{experts}.{expert}.up_proj.weight"] = matrix.map(lambda rows: rows[1::2], shape=shape)
        elif kind in ("down_proj", "down_proj_blocks"):
            for expert, matrix in enumerate(_gpt_oss_experts(state, name)):
                tensors[f"{experts}.{expert}.down_proj.weight"] = matrix
        elif not kind.endswith("_scales"):
            tensors[name] = tensor
    return moe_tensors(tensors, config)


GPT_OSS_FAMILIES: dict[str, Family] = {"gpt_oss": Family(_gpt_oss, _gpt_oss_tensors, sparse=True)}
