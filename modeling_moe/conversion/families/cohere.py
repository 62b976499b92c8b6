# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps Cohere2-MoE and DBRX, whose layer norms have no bias, to a MoE."""

from typing import Any

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from .base import Family, SourceFields, split_qkv
from .sparse_parts import moe_tensors, pairs_to_halves, sparse


# part of a tensor's name in DBRX -> part of the name in a MoE
DBRX_NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.norm_f.": "model.norm.",
    "transformer.blocks.": "model.layers.",
    ".norm_attn_norm.norm_1.": ".input_layernorm.",
    ".norm_attn_norm.norm_2.": ".post_attention_layernorm.",
    ".norm_attn_norm.attn.out_proj.": ".self_attn.o_proj.",
    ".norm_attn_norm.attn.": ".self_attn.",
    ".ffn.router.layer.": ".mlp.gate.",
    ".ffn.experts.mlp.": ".mlp.experts.",
}


def _cohere2_moe(fields: SourceFields) -> dict[str, Any]:
    # transformers' configuration has already merged these into rope_parameters, layer_types and mlp_layer_types
    fields.same("rope_theta", "rope_scaling", "sliding_window_pattern", "first_k_dense_replace")
    fields.require("expert_selection_fn", "softmax", "sigmoid")
    types = fields.same("layer_types", "mlp_layer_types")
    prefix_rotates = fields.take("prefix_dense_sliding_window_pattern") == 1
    softmax = fields.take("expert_selection_fn") == "softmax"
    values = sparse(fields) | types | fields.same("head_dim", "attention_bias", "sliding_window", "num_shared_experts")
    eps, rms_eps = fields.take("layer_norm_eps"), fields.take("rms_norm_eps")
    norm = {"norm_type": "layer", "norm_bias": False, "rms_norm_eps": eps} if rms_eps is None else {}
    combination = fields.same("shared_expert_combination_strategy")
    experts = fields.take("intermediate_size")
    return (
        values
        | norm
        | (combination if values["num_shared_experts"] else {})
        | {
            "intermediate_size": fields.take("prefix_dense_intermediate_size") or experts,
            "moe_intermediate_size": experts,
            "norm_placement": "parallel_shared",
            # layers without a window do not rotate, except dense ones if all of them attend to everything
            "no_rope_layers": [
                int(kind == "sliding_attention" or (mlp == "dense" and prefix_rotates))
                for kind, mlp in zip(types["layer_types"], types["mlp_layer_types"], strict=True)
            ],
            "rope_fp32": True,
            "scoring_func": "softmax" if softmax else "sigmoid",
            # a softmax over the chosen logits is the renormalised softmax over all
            "norm_topk_prob": bool(fields.take("norm_topk_prob")) or softmax,
            "router_aux_loss_coef": 0.0,
            "logits_scaling": 1 / fields.take("logit_scale"),
        }
    )


def _cohere2_moe_tensors(state: State, config: MoEConfig) -> State:
    """Applies [`moe_tensors`], and reorders the rows of queries and keys from interleaved pairs to halves."""
    order, kinds = pairs_to_halves(config.head_dim, 0), ("q_proj", "k_proj")
    tensors = moe_tensors(state, config).items()
    return {name: tensor.map(order) if name.split(".")[-2] in kinds else tensor for name, tensor in tensors}


def _dbrx(fields: SourceFields) -> dict[str, Any]:
    attention, network = fields.part("attn_config"), fields.part("ffn_config")
    # these repeat fields with standard names; transformers' model has no dropout after the embedding
    fields.same("d_model", "n_heads", "n_layers", "max_seq_len", "emb_pdrop")
    network.take("hidden_size")
    network.require("moe_normalize_expert_weights", 1.0, None)
    values = sparse(fields)
    # the attention stores this one, and the rotary embedding reads the one at the top of config.json
    attention.report("rope_theta")
    # the model reads moe_loss_weight in the place of this one
    fields.report("router_aux_loss_coef")
    width = network.take("ffn_hidden_size")
    return (
        values
        | fields.same("resid_pdrop")
        | {
            "num_key_value_heads": attention.take("kv_n_heads"),
            "attention_dropout": attention.take("attn_pdrop"),
            "clip_qkv": attention.take("clip_qkv"),
            "norm_type": "layer",
            "norm_bias": False,
            "rms_norm_eps": 1e-5,
            "intermediate_size": width,
            "hidden_act": network.take("ffn_act_fn").get("name", "silu"),
            "num_experts": network.take("moe_num_experts"),
            "num_experts_per_tok": network.take("moe_top_k"),
            "norm_topk_prob": network.take("moe_normalize_expert_weights") is not None,
            "router_jitter_noise": network.take("moe_jitter_eps") or 0.0,
            "router_aux_loss_coef": network.take("moe_loss_weight"),
        }
    )


def _dbrx_experts(name: str, tensor: LazyTensor, config: MoEConfig) -> State:
    """Splits `w1` (gate), `v1` (up) or `w2` (down, transposed), the rows (E * I, H) of all experts."""
    experts, _, kind = name.rpartition(".")
    part, width = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}[kind], config.moe_intermediate_size
    rows = {expert: tensor[expert * width : (expert + 1) * width] for expert in range(config.num_experts)}
    return {
        f"{experts}.{expert}.{part}.weight": matrix.transpose() if kind == "w2" else matrix
        for expert, matrix in rows.items()
    }


def _dbrx_tensors(state: State, config: MoEConfig) -> State:
    """Renames tensors, splits the fused rows of queries, keys and values, and splits experts."""
    tensors: State = {}
    for name, tensor in state.items():
        for old, new in DBRX_NAMES.items():
            name = name.replace(old, new)
        if ".Wqkv." in name:
            tensors |= split_qkv(name, "Wqkv", tensor, config)
        elif ".mlp.experts." in name:
            tensors |= _dbrx_experts(name, tensor, config)
        else:
            tensors[name] = tensor
    return moe_tensors(tensors, config)


COHERE_FAMILIES: dict[str, Family] = {
    "cohere2_moe": Family(_cohere2_moe, _cohere2_moe_tensors, sparse=True),
    "dbrx": Family(_dbrx, _dbrx_tensors, sparse=True),
}
