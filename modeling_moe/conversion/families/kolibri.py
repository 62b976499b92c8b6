# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps Kolibri to a MoE."""

from typing import Any

from .base import Family, SourceFields
from .sparse_parts import renamed_tensors, shared_expert, sparse


# part of a tensor's name, on disk or in memory -> part of the name in a MoE, applied in this order
NAMES = {
    ".post_attention_layernorm.": ".pre_feedforward_layernorm.",
    ".post_self_attn_layernorm.": ".post_attention_layernorm.",
    ".post_attn_norm.": ".post_attention_layernorm.",
    ".post_mlp_layernorm.": ".post_feedforward_layernorm.",
    ".post_ffn_norm.": ".post_feedforward_layernorm.",
    ".moe.router.expert_bias": ".mlp.gate.e_score_correction_bias",
}


def _kolibri1(fields: SourceFields) -> dict[str, Any]:
    widths = fields.same("head_dim", "moe_intermediate_size") | shared_expert(fields)
    values = sparse(fields) | widths | fields.same("layer_types", "sliding_window", "norm_topk_prob")
    return values | {
        # full attention rotates nothing
        "no_rope_layers": [int(kind == "sliding_attention") for kind in values["layer_types"]],
        "qk_norm": "head",
        "norm_placement": "sandwich",
        "scoring_func": "sigmoid",
        "router_selection_bias": True,
        "router_selection_bias_on": "logits",
        "router_aux_loss_coef": 0.0,  # transformers' model has no balance loss
    }


KOLIBRI_FAMILIES: dict[str, Family] = {"kolibri1": Family(_kolibri1, renamed_tensors(NAMES), sparse=True)}
