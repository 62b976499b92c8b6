# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps PhiMoE (Phi-3.5-MoE) to a MoE."""

from typing import Any

from ...utils.errors import UserError
from .base import Family, SourceFields
from .sparse_parts import moe_tensors, standard


def _rope(fields: SourceFields) -> dict[str, Any]:
    """Returns the rotary embedding, with PhiMoE's two scales of cosine and sine in the place of `attention_factor`.

    transformers' class rotates texts of every length by `short_factor`, and the result does so too. The code that Microsoft
    published with the weights rotates a text longer than `original_max_position_embeddings` by `long_factor`.

    Raises:
        UserError: for scales that depend on the length, or another rotary embedding than the default and longrope.
    """
    rope = dict(fields.take("rope_parameters") or {})
    short, long = rope.pop("short_mscale", None), rope.pop("long_mscale", None)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return rope
    if kind != "longrope" or short != long:
        raise UserError(
            f"rope_parameters has rope_type {kind!r}, short_mscale {short!r} and long_mscale {long!r} in the config.json of this "
            f"{fields.model_type} model, which cannot be converted: only 'default', and 'longrope' with equal scales, can."
        )
    # transformers writes this number beside the one in rope_parameters
    fields.require("original_max_position_embeddings", None, rope.get("original_max_position_embeddings"))
    return rope | {"attention_factor": short, "long_factor": rope.get("short_factor")}


def _phimoe(fields: SourceFields) -> dict[str, Any]:
    fields.require("num_experts_per_tok", 2)  # transformers' router chooses two, whatever the field says
    # this noise on the input of a sparse block, in training only, has no counterpart in a MoE
    fields.take("input_jitter_noise")
    # transformers reads this dropout, which published configurations name, for the classification of tokens alone
    fields.take("hidden_dropout")
    same = fields.same("attention_bias", "lm_head_bias", "sliding_window", "router_jitter_noise")
    return (
        standard(fields)
        | same
        | {
            "rope_parameters": _rope(fields),
            "norm_type": "layer",
            "router_gradient": "sparsemixer",
        }
    )


PHIMOE_FAMILIES: dict[str, Family] = {"phimoe": Family(_phimoe, moe_tensors, sparse=True)}
