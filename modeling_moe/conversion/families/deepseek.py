# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps the DeepSeek families, and those built like them, to a MoE."""

import math
from typing import Any

from ...checkpoints import State
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .base import Family, SourceFields
from .sparse_parts import moe_tensors, pairs_to_halves, sigmoid_routed, sparse


def deepseek_sparse(fields: SourceFields, partial: bool = False) -> dict[str, Any]:
    """Reads the fields that DeepSeek's three generations share.

    Args:
        fields: fields of the source.
        partial: whether the family allows heads that rotate only in part.
    """
    dense, every = fields.take("first_k_dense_replace", 0), fields.take("moe_layer_freq", 1)
    layers = range(fields.take("num_hidden_layers"))
    fields.take("ep_size")
    return sparse(fields, partial) | {
        "attention_bias": fields.take("attention_bias", False),
        "moe_intermediate_size": fields.take("moe_intermediate_size"),
        "mlp_layer_types": ["sparse" if i >= dense and i % every == 0 else "dense" for i in layers],
        "num_shared_experts": fields.take("n_shared_experts") or 0,
    }


def _deepseek_balance(fields: SourceFields) -> dict[str, Any]:
    """Returns the balance loss of the first two generations, which transformers' models do not compute.

    DeepSeek's loss is 1 in balance, where `router_aux_loss_coef` weighs one that is K in balance.
    """
    alpha, top_k = fields.take("aux_loss_alpha", 0.0), fields.take("num_experts_per_tok")
    if isinstance(alpha, (int, float)) and isinstance(top_k, int) and top_k > 0:  # MoEConfig refuses other values
        alpha = alpha / top_k
    return {
        "router_aux_loss_coef": alpha,
        "router_aux_loss_scope": "sequence" if fields.take("seq_aux", True) else "batch",
    }


def _deepseek(fields: SourceFields) -> dict[str, Any]:
    fields.require("scoring_func", "softmax")
    values = deepseek_sparse(fields) | _deepseek_balance(fields)
    # transformers has no class for this model, so rope_theta is still outside rope_parameters
    rope = {"rope_theta": fields.take("rope_theta", 10000.0)} | (fields.take("rope_parameters") or {})
    # the model's own code does not renormalise the weight of a single expert
    renormalise = bool(fields.take("norm_topk_prob", False)) and values["num_experts_per_tok"] > 1
    return values | {"rope_parameters": rope, "norm_topk_prob": renormalise}


def latent_attention(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields of multi-head latent attention; yarn's `mscale_all_dim` is merged into the scale of q·k."""
    widths = fields.same("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    # both fields follow from the widths, and transformers' model fails on other values
    plain, rotated = widths["qk_nope_head_dim"], widths["qk_rope_head_dim"]
    fields.require("head_dim", rotated, None)
    fields.require("qk_head_dim", plain + rotated, None)
    rope, scale = fields.take("rope_parameters"), None
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        mscale = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
        scale = (plain + rotated) ** -0.5 * mscale * mscale
    return widths | {"attention_multiplier": scale}


def deepseek_v2_router(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields of DeepSeek-V2's router, which does not renormalise and may be limited to groups of experts."""
    fields.require("scoring_func", "softmax")
    fields.require("topk_method", "greedy", "group_limited_greedy")
    # if it is true, DeepSeek's code renormalises and transformers does not
    fields.require("norm_topk_prob", False, None)
    groups: dict[str, Any] = fields.same("n_group", "topk_group")
    if fields.take("topk_method") == "greedy":
        groups = {"n_group": 1, "topk_group": 1}
    if isinstance(groups["n_group"], int) and groups["n_group"] > 1:
        groups["group_score"] = "max"
    return groups | {"norm_topk_prob": False} | fields.same("routed_scaling_factor")


def _deepseek_v2(fields: SourceFields) -> dict[str, Any]:
    fields.require("mlp_bias", False)
    router = deepseek_v2_router(fields)
    return deepseek_sparse(fields) | _deepseek_balance(fields) | latent_attention(fields) | router


def _deepseek_v3(fields: SourceFields) -> dict[str, Any]:
    fields.require("rope_interleave", True)
    fields.require("seq_aux", True)
    router = sigmoid_routed(fields) | {"router_seq_aux_loss_coef": fields.take("aux_loss_alpha", 0.0)}
    return deepseek_sparse(fields) | latent_attention(fields) | router


def latent_tensors(state: State, config: MoEConfig) -> State:
    """Applies [`moe_tensors`], and reorders the rotated rows of queries and keys from interleaved pairs to halves."""
    plain, rotated, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    if plain is None or rotated is None or rank is None:
        raise UserError(
            "kv_lora_rank, qk_nope_head_dim and qk_rope_head_dim must be set in the config.json of a DeepSeek model: "
            "download it again"
        )
    query = pairs_to_halves(plain + rotated, plain)
    key = pairs_to_halves(rank + rotated, rank)
    reorder = {"q_proj": query, "q_b_proj": query, "kv_a_proj_with_mqa": key}
    tensors = {}
    for name, tensor in moe_tensors(state, config).items():
        function = reorder.get(name.split(".")[-2]) if ".self_attn." in name else None
        tensors[name] = tensor if function is None else tensor.map(function)
    return tensors


DEEPSEEK_FAMILIES: dict[str, Family] = {
    "deepseek": Family(_deepseek, moe_tensors, sparse=True),
    "deepseek_v2": Family(_deepseek_v2, latent_tensors, sparse=True),
    "deepseek_v3": Family(_deepseek_v3, latent_tensors, sparse=True),
}
