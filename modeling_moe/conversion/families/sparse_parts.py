# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds what the conversions of several Mixture-of-Experts families share: fields, names and layouts.

Two layouts of experts are accepted: one tensor for each expert, as on disk, and transformers' fused tensors in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from .base import COMMON, SourceFields, parameters


# part of a tensor's name in a source -> part of the name in a MoE; no family uses a part for anything else
RENAMED = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w3.": ".up_proj.",
    ".w2.": ".down_proj.",
    ".shared_expert.": ".shared_experts.",
    ".mlp.router.gate.": ".mlp.gate.",
    ".mlp.router.": ".mlp.gate.",
    ".mlp.expert_bias": ".mlp.gate.e_score_correction_bias",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
    ".mlp.e_score_correction_bias": ".mlp.gate.e_score_correction_bias",
    ".mlp.shared_mlp.": ".mlp.shared_experts.",
}


def sparse(fields: SourceFields, partial: bool = False) -> dict[str, Any]:
    """Reads the fields that all sparse families share: the given ones of `COMMON`, and the number of experts.

    Args:
        fields: fields of the source.
        partial: whether the family allows heads that rotate only in part.
    """
    if not partial:
        fields.refuse_partial_rotation()
    # rope_parameters contains this field, which older releases of transformers keep outside too
    fields.take("partial_rotary_factor")
    common = {name: value for name, value in fields.same(*COMMON).items() if value is not None}
    # configurations of one family use either the family's name for the number or transformers' standard name
    counts = [fields.take(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    return common | {
        "num_experts": next((count for count in counts if count is not None), None),
        "num_experts_per_tok": fields.take("num_experts_per_tok"),
        "output_router_logits": fields.take("output_router_logits", False),
        "router_z_loss_coef": 0.0,
    }


def standard(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields of [`sparse`], head_dim and the coefficient of transformers' balance loss.

    A coefficient is kept wherever transformers' model computes the loss, also beside sigmoid scores: transformers takes a
    softmax of the logits for the loss, a MoE the normalised scores, and both losses are K in balance.
    """
    return sparse(fields) | fields.same("head_dim", "router_aux_loss_coef")


def shared_expert(fields: SourceFields, width: str = "shared_expert_intermediate_size") -> dict[str, Any]:
    """Reads the width of one shared expert; a source with the width 0 has none.

    Args:
        fields: fields of the source.
        width: name of the width in the source.
    """
    value = fields.take(width)
    return {"num_shared_experts": 1, "shared_expert_intermediate_size": value} if value else {}


def sigmoid_scores(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields of a router with sigmoid scores and a bias that is added only to choose experts."""
    # dots.llm1 names the choice of experts where others name the scores
    fields.require("scoring_func", "sigmoid", "noaux_tc")
    fields.require("topk_method", "noaux_tc")
    # transformers' models have no balance loss for it
    return {"scoring_func": "sigmoid", "router_selection_bias": True, "router_aux_loss_coef": 0.0}


def sigmoid_routed(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields of DeepSeek-V3's router, which chooses groups of experts first."""
    groups = fields.same("n_group", "topk_group", "routed_scaling_factor") | {"group_score": "top2sum"}
    # null is false in transformers' models
    return sigmoid_scores(fields) | groups | {"norm_topk_prob": bool(fields.take("norm_topk_prob"))}


def pairs_to_halves(width: int, plain: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that reorders the last `width - plain` rows of each head from interleaved pairs to halves."""
    order = [*range(plain), *range(plain, width, 2), *range(plain + 1, width, 2)]
    return lambda tensor: tensor.unflatten(0, (-1, width))[:, order].flatten(0, 1)


def halves_to_pairs(width: int, plain: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the inverse of [`pairs_to_halves`]."""
    half = (width - plain) // 2
    order = [*range(plain), *(plain + row for i in range(half) for row in (i, half + i))]
    return lambda tensor: tensor.unflatten(0, (-1, width))[:, order].flatten(0, 1)


def unfused(name: str, tensor: LazyTensor, transposed: bool = False) -> State:
    """Splits fused experts: `experts.gate_up_proj` (E, 2I, H), gate first, or one projection, as `experts.down_proj` (E, H, I).

    Args:
        name: the tensor's name.
        tensor: the experts of a layer.
        transposed: whether the tensor has the shape (E, H, 2I), or (E, I, H).
    """
    prefix, _, kind = name.rpartition(".")
    width = tensor.shape[2 if transposed else 1] // 2
    parts = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}
    if kind != "gate_up_proj":
        parts = {kind: slice(None)}
    return {
        f"{prefix}.{e}.{part}.weight": tensor[e, :, rows].transpose() if transposed else tensor[e, rows]
        for e in range(tensor.shape[0])
        for part, rows in parts.items()
    }


def moe_tensors(state: State, config: MoEConfig) -> State:
    """Renames the tensors of all families except gpt-oss, splits fused experts and casts correction biases to fp32."""
    tensors = {}
    for name, tensor in parameters(state, config).items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if name.endswith(".e_score_correction_bias"):
            tensor = tensor.to(torch.float32)
        if config.num_shared_experts == 0 and ".shared_experts." in name and tensor.numel == 0:
            continue  # transformers builds shared experts of width 0
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        tensors |= unfused(name, tensor) if fused else {name: tensor}
    return tensors


def renamed_tensors(names: Mapping[str, str]) -> Callable[[State, MoEConfig], State]:
    """Returns a function that replaces parts of tensors' names, in the order of `names`, and applies [`moe_tensors`]."""

    def tensors(state: State, config: MoEConfig) -> State:
        renamed: State = {}
        for name, tensor in state.items():
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = tensor
        return moe_tensors(renamed, config)

    return tensors
