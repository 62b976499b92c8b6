# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""PEFT's layer on a parameter, where that is a matrix of experts: it hands the factors to the experts' forward.

PEFT's own makes `W + s B A` of all experts in each forward, with a gradient as large. Its method that does so is
private; tests/lora/test_peft.py says with which release it changed.

# E experts, R rank, M columns of a matrix, N rows of it
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn
from torch.nn.utils import parametrize
from transformers.utils import logging

from ..dispatch.interface import reason_unsupported
from ..dispatch.low_rank import LowRank
from ..utils.errors import UserError
from . import sharding


logger = logging.get_logger(__name__)

Stock = peft_layer.ParamWrapper
MATRICES = ("gate_up_proj", "up_proj", "down_proj")
# transformers' default, for which this package's function can stand
REPLACED_IMPLEMENTATION, IMPLEMENTATION = "grouped_mm", "moe"
_stock_activation: Any = getattr(Stock, "_activate_lora", None)


def install() -> None:
    """Lets PEFT's layers on experts that are served here work on the tokens; a second call does nothing."""
    if _stock_activation is None:
        logger.warning(
            f"PEFT {peft.__version__} has no ParamWrapper._activate_lora: LoRA on experts is left to PEFT, which builds "
            "every expert's updated weight in each forward. Install an older release."
        )
    else:
        Stock._activate_lora = _activate_lora


@contextmanager
def peft_alone() -> Iterator[None]:
    """PEFT's own path for all layers, to compare with."""
    current = Stock._activate_lora
    Stock._activate_lora = _stock_activation
    try:
        yield
    finally:
        Stock._activate_lora = current


def is_experts(module: Any) -> bool:
    """Whether `module` follows transformers' experts interface."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def left_to_peft(module: Any) -> str | None:
    """Why experts are updated the way PEFT does it, or None if they are served here.

    Raises:
        UserError: if nobody can, since a process holds a part of each expert.
    """
    if any(sharding.splits_experts(parameter) for parameter in module.parameters(recurse=False)):
        raise UserError("LoRA on experts: tp_size splits each of them, set ep_size too to split them by expert")
    implementation = module.config._experts_implementation
    if implementation != REPLACED_IMPLEMENTATION and not implementation.startswith(IMPLEMENTATION):
        return f"experts_implementation is {implementation!r}, load the model with {IMPLEMENTATION!r}"
    return reason_unsupported(module)


def _serves(wrapper: Stock) -> bool:
    """Whether the experts under `wrapper` take the factors of its parameter, which a warning says if not."""
    module: Any = wrapper.get_base_layer()
    if not is_experts(module) or wrapper.parameter_name not in MATRICES:
        return False
    reason = left_to_peft(module)
    if reason is not None:
        if parametrize.is_parametrized(module, wrapper.parameter_name):
            raise UserError(f"LoRA on {wrapper.parameter_name} in 4 bits: {reason}")
        logger.warning_once(f"LoRA on {type(module).__name__} builds every expert's updated weight: {reason}.")
        return False
    if module.config._experts_implementation == REPLACED_IMPLEMENTATION:
        module.config._experts_implementation = IMPLEMENTATION
    return True


@contextmanager
def _activate_lora(wrapper: Stock, active_adapters: list[str]) -> Iterator[None]:
    """PEFT's `ParamWrapper._activate_lora`; a matrix in 4 bits is dequantized once, however often it is looked at."""
    with parametrize.cached(), _activated(wrapper, active_adapters):
        yield


@contextmanager
def _activated(wrapper: Stock, active_adapters: list[str]) -> Iterator[None]:
    adapters = [name for name in active_adapters if name in wrapper.lora_A]
    if not adapters or not _serves(wrapper):
        if any(_dropout(wrapper, name) for name in adapters):
            raise UserError(
                f"lora_dropout on {wrapper.parameter_name} needs experts_implementation='moe': set it to 0"
            )
        with _stock_activation(wrapper, active_adapters):
            yield
        return
    module = wrapper.get_base_layer()
    # the experts' other matrices have wrappers of their own around or inside this one
    others = getattr(module, "low_rank", {})
    module.low_rank = {**others, wrapper.parameter_name: low_rank(wrapper, adapters)}
    try:
        yield
    finally:
        module.low_rank = others


def _dropout(wrapper: Stock, adapter: str) -> float:
    dropout = wrapper.lora_dropout[adapter]
    return dropout.p if isinstance(dropout, nn.Dropout) and wrapper.training else 0.0


def low_rank(wrapper: Stock, adapters: list[str]) -> LowRank:
    """The adapters' factors as one: side by side along the rank, for the experts that this process holds.

    Raises:
        UserError: for adapters of different dropout.
    """
    dropout = _dropout(wrapper, adapters[0])
    if any(_dropout(wrapper, name) != dropout for name in adapters):
        raise UserError(f"adapters {', '.join(adapters)} differ in lora_dropout: activate one at a time to train")
    factors = [_factors(wrapper, name) for name in adapters]
    scalings = [wrapper.scaling[name] for name in adapters]
    if len(factors) == 1:
        return LowRank(*factors[0], scalings[0], dropout)
    a = torch.cat([a * scaling for (a, _), scaling in zip(factors, scalings, strict=True)], dim=1)
    return LowRank(a, torch.cat([b for _, b in factors], dim=2), 1.0, dropout)


def _factors(wrapper: Stock, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, R, M) and (E, N, R), of which PEFT holds (E*R, M), expert by expert, and (N, R*E), rank by rank."""
    a: Any = wrapper.lora_A[adapter].weight
    b: Any = wrapper.lora_B[adapter].weight
    experts = wrapper.num_experts
    a = a.view(experts, -1, a.shape[1])
    b = b.view(len(b), -1, experts).permute(2, 0, 1)
    distributed = getattr(wrapper.get_base_layer().config, "distributed_config", None)
    tp_size = distributed.tp_size if distributed is not None else 1
    a, b = sharding.of_local_experts([a, b], wrapper.get_param(), tp_size)
    return a, b


def _without_dropout(config: peft.LoraConfig) -> peft.LoraConfig:
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


class ParamWrapper(Stock):
    """PEFT's, with `lora_dropout`, which PEFT refuses. It goes by the class's name in places."""

    def __init__(self, base_layer, adapter_name, parameter_name, config, **kwargs):
        super().__init__(base_layer, adapter_name, parameter_name, _without_dropout(config), **kwargs)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs) -> None:
        super().update_layer(adapter_name, r, lora_alpha, _without_dropout(config), **kwargs)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)


def wrap(target: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs) -> ParamWrapper | None:
    """A layer on a matrix of experts, None for any other target: a custom module in PEFT's sense."""
    module = target.get_base_layer() if isinstance(target, Stock) else target
    if parameter_name not in MATRICES or not is_experts(module) or left_to_peft(module) is not None:
        return None
    return ParamWrapper(target, adapter_name, parameter_name, **kwargs)


install()
