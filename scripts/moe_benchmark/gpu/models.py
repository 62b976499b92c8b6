# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the small model that the GPU check trains, and measures the distance of two sets of gradients."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_moe import MoEConfig, MoEForCausalLM

from ..workloads import experts_in
from .sizes import Size


# an error is relative to the largest element of a gradient, or to this share of the largest element of all gradients
ROUNDING = 1e-3


def make_model(size: Size, dtype: torch.dtype = torch.float32) -> MoEForCausalLM:
    """Returns the model of a size on the GPU in training mode; its attention returns equal bits in each run.

    The output of its experts is as large as the residual stream, so that their errors are visible.
    """
    torch.manual_seed(0)
    config = MoEConfig(**size.model)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for experts in experts_in(model):
        for matrix in experts.parameters():
            nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5)
    return model.to("cuda").train()


def half_of(size: Size) -> torch.dtype:
    """Returns the 16-bit dtype in which the model of a size is trained."""
    return getattr(torch, size.half)


def make_ids(size: Size, seed: int = 0) -> torch.Tensor:
    """Returns token ids (B, S) on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size.model["vocab_size"], size.batch, generator=generator).to("cuda")


def gradients_of(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the loss, and the gradients of all parameters that have one, by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach(), **gradients}


def worst_difference(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> tuple[str, float]:
    """Returns the quantity with the largest relative error, and that error: largest difference over largest
    expected element.

    Raises:
        ValueError: if the two hold different quantities.
    """
    if got.keys() != expected.keys():
        raise ValueError(f"gradients of {sorted(got.keys() ^ expected.keys())} are in only one of the two models")
    floor = ROUNDING * max(tensor.abs().max().item() for tensor in expected.values())
    differences = {}
    for name, tensor in expected.items():
        difference = (got[name].double() - tensor.double()).abs().max().item()
        differences[name] = difference / max(tensor.abs().max().item(), floor)
    # a NaN is worse than any other value
    return max(differences.items(), key=lambda item: (item[1] != item[1], item[1]))


def distances(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns, for each quantity, the norm of the differences over the norm of the expected values."""
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    floor = ROUNDING * max(norms.values())
    return {
        name: (got[name].double() - tensor.double()).norm().item() / max(norms[name], floor)
        for name, tensor in expected.items()
    }
