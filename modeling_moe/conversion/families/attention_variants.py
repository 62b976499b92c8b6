# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps families whose attention, or the norms around it, have one feature that no earlier family has."""

from typing import Any

import torch

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .base import Family, SourceFields
from .deepseek import DEEPSEEK_FAMILIES, deepseek_sparse, latent_attention, latent_tensors
from .sparse_parts import renamed_tensors, sparse


# part of a tensor's name in a family -> part of the name in a MoE
HUNYUAN_NAMES = {
    ".mlp.gate.wg.": ".mlp.gate.",
    ".query_layernorm.": ".q_norm.",
    ".key_layernorm.": ".k_norm.",
}
AFMOE_NAMES = {
    ".pre_mlp_layernorm.": ".pre_feedforward_layernorm.",
    ".post_mlp_layernorm.": ".post_feedforward_layernorm.",
}


def _axk1(fields: SourceFields) -> dict[str, Any]:
    values = DEEPSEEK_FAMILIES["deepseek_v3"].fields(fields)
    # newer releases of transformers merge first_k_dense_replace and moe_layer_freq into this field
    kinds = fields.take("mlp_layer_types") or values["mlp_layer_types"]
    return values | {"mlp_layer_types": kinds, "sparse_output_norm": True}


def _axk1_tensors(state: State, config: MoEConfig) -> State:
    """Maps the tensors of DeepSeek-V3 and the norms of sparse outputs.

    The published checkpoints have a norm, which nothing uses, in dense layers too, and no correction biases.
    """
    renamed: State = {}
    kinds = dict(enumerate(config.mlp_layer_types))
    for name, tensor in state.items():
        if "post_mlp_layernorm" in name:
            layer = int(name.split(".")[2])
            if kinds.get(layer) == "dense":
                continue
            name = f"model.layers.{layer}.post_feedforward_layernorm.weight"
        renamed[name] = tensor
    zeros = torch.zeros(config.num_experts)
    for layer, kind in kinds.items():
        if kind == "sparse":
            renamed.setdefault(f"model.layers.{layer}.mlp.gate.e_score_correction_bias", LazyTensor.of(zeros))
    return DEEPSEEK_FAMILIES["deepseek_v3"].tensors(renamed, config)


def _mistral4(fields: SourceFields) -> dict[str, Any]:
    fields.require("rope_interleave", True)
    rope, plain, rotated = (fields.take(name) for name in ("rope_parameters", "qk_nope_head_dim", "qk_rope_head_dim"))
    width = plain + rotated
    fields.require("head_dim", width)
    if rope["rope_type"] == "default" or rope.get("partial_rotary_factor") != rotated / width:
        raise UserError(
            "rope_parameters in the config.json of this mistral4 model has no rotation of qk_rope_head_dim features that "
            f"transformers' model can compute: set rope_type to yarn and partial_rotary_factor to {rotated / width:g}"
        )
    beta = rope.get("llama_4_scaling_beta")
    # DeepSeek's head_dim counts the features that rotate, and all of them rotate
    kept = ("partial_rotary_factor", "max_position_embeddings", "llama_4_scaling_beta")
    fields = fields.replaced(
        head_dim=rotated, rope_parameters={name: value for name, value in rope.items() if name not in kept}
    )
    router = fields.same("n_group", "topk_group", "routed_scaling_factor")
    router |= {"norm_topk_prob": bool(fields.take("norm_topk_prob")), "router_aux_loss_coef": 0.0}
    return deepseek_sparse(fields) | latent_attention(fields) | router | {"llama_4_scaling_beta": beta or None}


def _hunyuan(fields: SourceFields) -> dict[str, Any]:
    values = sparse(fields) | fields.same("head_dim", "attention_bias")
    # the field has another name in the published checkpoints, where it has an entry for each layer
    if isinstance(top_k := fields.take("moe_topk"), list):
        if len(set(top_k)) != 1:
            raise UserError(
                f"moe_topk is {top_k!r} in the config.json of this {fields.model_type} model: a MoE sends every token to "
                "one number of experts in all layers"
            )
        top_k = top_k[0]
    rope = dict(values["rope_parameters"])
    if rope["rope_type"] == "dynamic" and (alpha := rope.get("alpha")):
        width = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * alpha ** (width / (width - 2))}
    return values | {
        "rope_parameters": rope,
        "num_experts_per_tok": top_k,
        "num_shared_experts": 1,
        "qk_norm": "head",
        "qk_norm_after_rope": True,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0,
    }


def _afmoe(fields: SourceFields) -> dict[str, Any]:
    # transformers' configuration has already merged this field into layer_types
    fields.take("global_attn_every_n_layers")
    same = fields.same("head_dim", "attention_bias", "moe_intermediate_size", "num_shared_experts")
    values = sparse(fields) | same | fields.same("sliding_window", "layer_types")
    dense = fields.take("num_dense_layers")
    return values | {
        "embedding_multiplier": values["hidden_size"] ** 0.5 if fields.take("mup_enabled") else 1.0,
        "norm_type": "rms_fp32",
        "norm_placement": "sandwich",
        "qk_norm": "head",
        "attn_output_gate": True,
        # only layers with a window rotate
        "no_rope_layers": [int(kind == "sliding_attention") for kind in values["layer_types"]],
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(values["num_hidden_layers"])],
        "scoring_func": "sigmoid",
        "router_selection_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": fields.take("route_scale"),
        "router_aux_loss_coef": 0.0,
    }


ATTENTION_FAMILIES: dict[str, Family] = {
    "axk1": Family(_axk1, _axk1_tensors, sparse=True),
    "mistral4": Family(_mistral4, latent_tensors, sparse=True),
    "hunyuan_v1_moe": Family(_hunyuan, renamed_tensors(HUNYUAN_NAMES), sparse=True),
    "afmoe": Family(_afmoe, renamed_tensors(AFMOE_NAMES), sparse=True),
}
