# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps IBM's sparse Granite families to a MoE."""

from typing import Any

from ...checkpoints import State
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .base import Family, SourceFields
from .sparse_parts import moe_tensors, shared_expert, standard


# part of a tensor's name in a published checkpoint or in transformers -> part of the name in transformers or in a MoE
NAMES = {
    ".block_sparse_moe.input_linear.weight": ".mlp.experts.gate_up_proj",
    ".block_sparse_moe.output_linear.weight": ".mlp.experts.down_proj",
    ".block_sparse_moe.router.layer.": ".mlp.gate.",
    ".shared_mlp.output_linear.": ".mlp.shared_experts.down_proj.",
}
SHARED_INPUT = ".shared_mlp.input_linear."


def _granitemoe(fields: SourceFields) -> dict[str, Any]:
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    # the family takes a softmax over the chosen logits, which is a softmax over all with renormalised weights
    return standard(fields) | fields.same("attention_bias", *multipliers) | {"norm_topk_prob": True}


def _granitemoeshared(fields: SourceFields) -> dict[str, Any]:
    return _granitemoe(fields) | shared_expert(fields, "shared_intermediate_size")


def _layer_rotations(fields: SourceFields) -> dict[str, Any]:
    """Returns the rotation of layers whose theta the source gives in a list, where 0 stands for no rotation.

    Raises:
        UserError: if layers of one attention type have different thetas, or the list has no entry for each layer.
    """
    rope, kinds, thetas = (fields.take(name) for name in ("rope_parameters", "layer_types", "layer_rope_theta"))
    if len(kinds) != len(thetas):
        raise UserError(
            f"layer_rope_theta has {len(thetas)} entries in the config.json of this {fields.model_type} model: write one for "
            f"each of the {len(kinds)} layers"
        )
    by_kind: dict[str, set[float]] = {}
    for kind, theta in zip(kinds, thetas, strict=True):
        by_kind.setdefault(kind, set()).update([theta] if theta else [])
    for kind, found in by_kind.items():
        if len(found) > 1:
            raise UserError(
                f"layer_rope_theta has {len(found)} values for layers of {kind} in the config.json of this "
                f"{fields.model_type} model, which cannot be converted: only one value, and 0, can."
            )
    used = {theta for found in by_kind.values() for theta in found}
    # a theta that no layer uses stands where no layer of a kind rotates
    unused = min(used, default=rope["rope_theta"])
    parameters = {kind: rope | {"rope_theta": min(found, default=unused)} for kind, found in by_kind.items()}
    return {
        "rope_parameters": parameters if len(used) > 1 else rope | {"rope_theta": unused},
        "no_rope_layers": None if all(thetas) else [int(bool(theta)) for theta in thetas],
    }


def _granitemoe_swa(fields: SourceFields) -> dict[str, Any]:
    window = fields.same("sliding_window", "layer_types")
    return _granitemoeshared(fields) | window | _layer_rotations(fields) | {"attention_sinks": True}


def _granite_tensors(state: State, config: MoEConfig) -> State:
    """Applies [`moe_tensors`] after renaming the published names and splitting the shared expert's fused projection."""
    tensors: State = {}
    for name, tensor in state.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if SHARED_INPUT in name:
            width = tensor.shape[0] // 2
            tensors[name.replace(SHARED_INPUT, ".mlp.shared_experts.gate_proj.")] = tensor[:width]
            tensors[name.replace(SHARED_INPUT, ".mlp.shared_experts.up_proj.")] = tensor[width:]
        else:
            tensors[name] = tensor
    return moe_tensors(tensors, config)


GRANITE_FAMILIES: dict[str, Family] = {
    "granitemoe": Family(_granitemoe, _granite_tensors, sparse=True),
    "granitemoeshared": Family(_granitemoeshared, _granite_tensors, sparse=True),
    "granitemoe_swa": Family(_granitemoe_swa, _granite_tensors, sparse=True),
}
