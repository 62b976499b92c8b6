# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module fills the parameters of new routed experts, derives others from them, and chooses what computes the experts."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .checkpoint_layout import fill_experts


class StackedExperts(nn.Module):
    """Base class of experts whose matrices are stacked in memory (E, rows, columns), and stored one by one on disk."""

    num_experts: int

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # `Trainer` resumes by `load_state_dict`, which does not convert the layout on disk
        missing, errors = fill_experts(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys.extend(missing)
        error_msgs.extend(errors)


def experts_of_transformers(config: Any) -> str:
    """Returns the experts implementation that runs a model in a process where this package is not imported.

    It is transformers' default, `grouped_mm`, or `eager` for sizes that torch's grouped product does not take: the rows of
    the experts' matrices must be multiples of 16 bytes, here in 16 bits.
    """
    widths = config.moe_latent_size or config.hidden_size, config.moe_intermediate_size
    return "grouped_mm" if all(width % 8 == 0 for width in widths) else "eager"


def default_experts(config: Any) -> str | None:
    """Returns the experts implementation of a model that asks for none, or None where transformers' default runs the model.

    It is `moe` in a process where this package is imported, else [`experts_of_transformers`].
    """
    if "moe" in ALL_EXPERTS_FUNCTIONS:
        return "moe"
    name = experts_of_transformers(config)
    # transformers takes its default by itself, after a test of whether the class supports it
    return None if name == "grouped_mm" else name


class ExpertParameters(NamedTuple):
    """The parameters of experts, under the names that [`~modeling_moe.modeling_moe.ExpertsBase`] gives them.

    Attributes:
        weights: name -> weight or bias, with E experts in the first dimension.
        low_rank: name of a weight -> low-rank update that `modeling_moe.lora` adds to the weight.
    """

    weights: dict[str, torch.Tensor]
    low_rank: dict[str, Any]


def _parameters(experts: Any) -> ExpertParameters:
    names = [experts.up_name, "down_proj"]
    if experts.has_bias:
        names += [f"{experts.up_name}_bias", "down_proj_bias"]
    # read as attributes: PEFT and quantizers compute what they put in the place of a parameter
    return ExpertParameters({name: getattr(experts, name) for name in names}, experts.__dict__.get("low_rank", {}))


def detached_parameters(experts: Any) -> ExpertParameters:
    """Returns the experts' parameters without gradient."""
    weights, updates = _parameters(experts)
    updates = {name: update._replace(a=update.a.detach(), b=update.b.detach()) for name, update in updates.items()}
    return ExpertParameters({name: weight.detach() for name, weight in weights.items()}, updates)


def merged_parameters(experts: Any, gates: torch.Tensor) -> ExpertParameters:
    """Returns the parameters of G experts, each the sum of E experts weighted by a row of `gates` (G, E).

    Raises:
        ValueError: for low-rank updates with dropout, which a merged weight cannot have.
    """
    weights, updates = _parameters(experts)
    for name, update in updates.items():
        if update.dropout:
            raise ValueError("router_type='lory' merges the experts' weights: set lora_dropout to 0.")
        weights[name] = weights[name] + update.scaling * (update.b @ update.a).to(weights[name].dtype)
    return ExpertParameters({name: torch.tensordot(gates.to(w.dtype), w, dims=1) for name, w in weights.items()}, {})


def init_experts(experts: nn.Module, std: float) -> None:
    """Fills the parameters of new experts: biases with 0, weights with normal numbers of deviation `std`."""
    for name, parameter in experts.named_parameters(recurse=False):
        if name.endswith("bias"):
            init.zeros_(parameter)
        else:
            init.normal_(parameter, mean=0.0, std=std)
