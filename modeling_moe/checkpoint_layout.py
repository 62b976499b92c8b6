# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the layout of a checkpoint: one tensor per expert on disk, one tensor for all experts in memory."""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


def register_expert_layout(model_type: str) -> None:
    """Lets transformers write one tensor per expert (`experts.0.gate_proj.weight`) and fuse these tensors when it loads.

    Servers and older tools know only the names of single experts. Biases, and the first matrices of feed-forward experts
    without a gate, stay fused on disk, because no server runs them.
    """
    # the lookahead excludes biases: transformers before 5.23 matches their longer names too when it saves
    gate, up, down = (f"mlp.experts.*.{name}_proj.weight" for name in ("gate", "up", "down"))
    inside = "self_attn.experts"
    # the installed copy of this file registers the layout, and so does each copy that a checkpoint brings
    register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightConverter(
                [gate, up], "mlp.experts.gate_up_proj(?!_bias)", [MergeModulelist(dim=0), Concatenate(dim=1)]
            ),
            WeightConverter(down, "mlp.experts.down_proj(?!_bias)", [MergeModulelist(dim=0)]),
            WeightConverter(f"{inside}.*.up_proj.weight", f"{inside}.up_proj", [MergeModulelist(dim=0)]),
            WeightConverter(f"{inside}.*.down_proj.weight", f"{inside}.down_proj", [MergeModulelist(dim=0)]),
        ],
        overwrite=True,
    )


# parameter in memory -> tensors on disk, in the order in which their rows are stacked
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


def fuse_experts(state_dict: dict[str, torch.Tensor], prefix: str, num_experts: int) -> None:
    """Replaces the tensors of single experts by fused tensors, in place; a state dict of fused tensors does not change."""
    stacks = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        keys = [f"{prefix}{expert}.{name}.weight" for expert in range(num_experts)]
        if all(key in state_dict for key in keys):
            stacks[name] = torch.stack([state_dict.pop(key) for key in keys])
    if "gate_proj" in stacks and "up_proj" in stacks:
        stacks["gate_up_proj"] = torch.cat([stacks.pop("gate_proj"), stacks.pop("up_proj")], dim=1)
    state_dict |= {f"{prefix}{name}": stack for name, stack in stacks.items()}


def fill_experts(experts: Any, state_dict: dict[str, torch.Tensor], prefix: str) -> tuple[list[str], list[str]]:
    """Replaces the tensors of single experts by fused tensors, in place; experts without a tensor keep their weights.

    A layer whose experts are in two files can therefore be loaded file by file.

    Args:
        experts: a module of `num_experts` experts with the parameters `gate_up_proj` (E, 2I, H) or `up_proj` (E, I, H), and
            `down_proj` (E, H, I).
        state_dict: tensors by name, of any part of a model.
        prefix: the beginning of the names of this module's tensors.

    Returns:
        The names of missing tensors of experts, where the state dict has that tensor of another expert; and errors, one
        sentence each.
    """
    missing: list[str] = []
    errors: list[str] = []
    for fused, parts in PARTS.items():
        parameter = experts._parameters.get(fused)
        keys = [f"{prefix}{expert}.{part}.weight" for expert in range(experts.num_experts) for part in parts]
        found = {place: state_dict.pop(key) for place, key in enumerate(keys) if key in state_dict}
        if parameter is None or not found:
            state_dict |= {keys[place]: tensor for place, tensor in found.items()}
        elif len(found) == len(keys) and len({tensor.shape for tensor in found.values()}) == 1:
            state_dict[f"{prefix}{fused}"] = (
                torch.stack(list(found.values())).flatten(0, 1).unflatten(0, (experts.num_experts, -1))
            )
        elif parameter.is_meta:
            errors.append(
                f"{prefix}{fused} has no memory that some of its experts could be written to: load all at once"
            )
        else:
            missing += [key for place, key in enumerate(keys) if place not in found]
            filled = parameter.detach().clone()
            rows = [row for expert in filled for row in expert.chunk(len(parts))]
            for place, tensor in found.items():
                if tensor.shape == rows[place].shape:
                    rows[place].copy_(tensor)
                else:
                    shapes = f"{tuple(tensor.shape)} in the checkpoint, {tuple(rows[place].shape)} in the model"
                    errors.append(f"size mismatch for {keys[place]}: {shapes}")
            state_dict[f"{prefix}{fused}"] = filled
    return missing, errors
