# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds checks of part `correctness`: LoRA on experts against PEFT's own code, and experts in 4 bits."""

import importlib.util
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_moe.lora import enable, peft_alone, quantize_experts
from modeling_moe.lora.layers import MATRICES

from ..workloads import experts_in
from .models import gradients_of, make_ids, make_model, worst_difference
from .results import Results
from .sizes import Size


RANK, TOLERANCE = 8, 1e-4
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _adapted(size: Size) -> Any:
    """Returns the model of a size in float32, with random low-rank factors on its experts."""
    enable()
    model = get_peft_model(make_model(size), LoraConfig(r=RANK, lora_alpha=RANK, target_parameters=TARGETS))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.to("cuda")


def lora_as_peft(results: Results, size: Size) -> None:
    """Checks that gradients of adapters on experts equal those of PEFT's own code, which builds each updated matrix."""
    model, ids = _adapted(size), make_ids(size)
    got = gradients_of(model, ids)
    model.get_base_model().set_experts_implementation("eager")
    with peft_alone():
        expected = gradients_of(model, ids)
    quantity, worst = worst_difference(got, expected)
    passed = worst <= TOLERANCE and len(expected) > 1
    results.check("LoRA equals PEFT's own code", passed, worst=worst, of=quantity, at_most=TOLERANCE)


@torch.no_grad()
def _copy_dequantized(model: nn.Module, quantized: nn.Module) -> None:
    """Replaces the experts of `model` by the dequantized experts of `quantized`."""
    for module, other in zip(experts_in(model), experts_in(quantized), strict=True):
        for name in MATRICES:
            if hasattr(module, name):
                getattr(module, name).copy_(getattr(other, name))


def four_bits(results: Results, size: Size) -> None:
    """Checks that adapters on experts in 4 bits have the gradients of adapters on the dequantized experts."""
    if importlib.util.find_spec("bitsandbytes") is None:
        results.put(check="experts in 4 bits", skipped="bitsandbytes is not installed")
        return
    quantized, reference, ids = _adapted(size), _adapted(size), make_ids(size)
    before = torch.cuda.memory_allocated()
    quantize_experts(quantized)
    freed = before - torch.cuda.memory_allocated()
    _copy_dequantized(reference, quantized)
    quantity, worst = worst_difference(gradients_of(quantized, ids), gradients_of(reference, ids))
    results.check("experts in 4 bits", worst <= TOLERANCE, worst=worst, of=quantity, freed_bytes=freed)
