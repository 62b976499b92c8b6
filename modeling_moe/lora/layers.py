# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lets PEFT's layer on the matrices of experts hand the low-rank factors to the experts' forward pass.

PEFT's own layer (`ParamWrapper`) computes `W + s B A` for all experts in each forward pass, with a gradient as large.
The method that does this, `_activate_lora`, is private: tests/lora/test_peft.py notices when a release of PEFT changes
it.

# E experts, R rank, M columns of a matrix, N rows of a matrix
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeGuard

import peft
import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..dispatch.interface import follows_interface, reason_unsupported
from ..dispatch.low_rank import LowRank
from ..utils.errors import UserError
from . import sharding


logger = logging.get_logger(__name__)

Stock = peft_layer.ParamWrapper
MATRICES = ("gate_up_proj", "up_proj", "down_proj")
# transformers' default implementation, and the one of this package that takes its place under an adapter
REPLACED_IMPLEMENTATION, IMPLEMENTATION = "grouped_mm", "moe"
_stock_activate = getattr(Stock, "_activate_lora", None)
_stock_merge = Stock.merge
# an adapted layer changes its experts while it computes, and another thread may compute the same layer
_LOCK = threading.RLock()


class ServedConfig:
    """A view of a configuration with another experts implementation; every other attribute is the configuration's.

    The configuration itself belongs to all layers of the model, and is not changed.
    """

    def __init__(self, config: "PreTrainedConfig | ServedConfig"):
        self._config = config
        self._experts_implementation = IMPLEMENTATION

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._config, name)


class Experts(nn.Module):
    """The type of modules for which [`is_experts`] is true; their classes are transformers' own, and not this one.

    Attributes:
        config: the model's configuration, which names the experts' implementation.
        low_rank: updates by name of the matrix; present while an adapted layer computes.
    """

    config: PreTrainedConfig | ServedConfig
    low_rank: dict[str, LowRank]


def is_experts(module: object) -> TypeGuard[Experts]:
    """Returns whether `module` follows transformers' experts interface."""
    return isinstance(module, nn.Module) and follows_interface(module)


def reason_for_peft(module: Any) -> str | None:
    """Returns why PEFT's own path must update these experts, or None if this package can.

    Raises:
        UserError: if each process holds a part of every expert, which neither path can update.
    """
    if any(sharding.splits_experts(parameter) for parameter in module.parameters(recurse=False)):
        raise UserError("LoRA on experts: tp_size splits each of them, set ep_size too to split them by expert")
    implementation = module.config._experts_implementation or "eager"
    if implementation != REPLACED_IMPLEMENTATION and not implementation.startswith(IMPLEMENTATION):
        return f"experts_implementation is {implementation!r}, load the model with {IMPLEMENTATION!r}"
    return reason_unsupported(module)


def _served_experts(wrapper: Stock) -> Experts | None:
    """Returns the experts under `wrapper` if they can take its factors, else None.

    A warning names the reason where experts cannot.

    Raises:
        UserError: if experts in 4 bits cannot, since PEFT's own path does not support them.
    """
    module = wrapper.get_base_layer()
    if not is_experts(module) or wrapper.parameter_name not in MATRICES:
        return None
    if reason := reason_for_peft(module):
        if parametrize.is_parametrized(wrapper.get_base_layer(), wrapper.parameter_name):
            raise UserError(f"LoRA on {wrapper.parameter_name} in 4 bits: {reason}")
        logger.warning_once(f"LoRA on {type(module).__name__} builds every expert's updated weight: {reason}.")
        return None
    return module


@contextmanager
def activate_lora(wrapper: Stock, active_adapters: list[str]) -> Iterator[None]:
    """Applies the active adapters inside the block, in the place of PEFT's `ParamWrapper._activate_lora`."""
    lock = nullcontext() if torch.compiler.is_compiling() else _LOCK
    # a matrix in 4 bits is dequantized once, however often it is read
    with lock, parametrize.cached(), _activated(wrapper, active_adapters):
        yield


def _activated(wrapper: Stock, active_adapters: list[str]) -> AbstractContextManager[None]:
    adapters = [name for name in active_adapters if name in wrapper.lora_A]
    experts = _served_experts(wrapper) if adapters else None
    if experts is not None:
        return _with_updates(experts, wrapper.parameter_name, low_rank(wrapper, adapters))
    _refuse_dropout(wrapper, adapters)
    assert _stock_activate is not None  # `enable` replaces only what PEFT has
    return _stock_activate(wrapper, active_adapters)


@contextmanager
def _with_updates(experts: Experts, name: str, update: LowRank) -> Iterator[None]:
    """Gives the experts an update of the matrix `name`, and this package's implementation, inside the block."""
    config = experts.config
    # the wrappers of the experts' other matrices lie around or inside this one
    others: dict[str, LowRank] | None = vars(experts).get("low_rank")
    experts.low_rank = {**(others or {}), name: update}
    if config._experts_implementation == REPLACED_IMPLEMENTATION:
        experts.config = ServedConfig(config)
    try:
        yield
    finally:
        experts.config = config
        if others is None:
            del experts.low_rank
        else:
            experts.low_rank = others


def _dropout(wrapper: Stock, adapter: str) -> float:
    dropout = wrapper.lora_dropout[adapter]
    return dropout.p if isinstance(dropout, nn.Dropout) and wrapper.training else 0.0


def _refuse_dropout(wrapper: Stock, adapters: list[str]) -> None:
    if any(_dropout(wrapper, name) for name in adapters if name in wrapper.lora_A):
        raise UserError(
            f"lora_dropout on {wrapper.parameter_name} needs experts_implementation='moe' and modeling_moe.lora.enable(): "
            "set it to 0"
        )


def low_rank(wrapper: Stock, adapters: list[str]) -> LowRank:
    """Returns the factors of all adapters as one update of the experts that this process computes.

    The factors of several adapters are joined along the rank.

    Raises:
        UserError: if the adapters differ in dropout.
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
    """Returns the factors of one adapter as (E, R, M) and (E, N, R).

    PEFT holds them as (E*R, M), expert after expert, and (N, R*E), rank after rank.
    """
    a, b = wrapper.lora_A[adapter].get_parameter("weight"), wrapper.lora_B[adapter].get_parameter("weight")
    experts = wrapper.num_experts
    of_experts = [a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)]
    distributed = getattr(wrapper.get_base_layer().config, "distributed_config", None)
    tp_size = distributed.tp_size if distributed is not None else 1
    a, b = sharding.of_local_experts(of_experts, wrapper.get_param(), tp_size)
    return a, b


def merge(wrapper: Stock, *args: Any, **kwargs: Any) -> None:
    """Merges as PEFT's `ParamWrapper.merge` does, and refuses a matrix in 4 bits, of which PEFT would change a copy, and
    offloaded experts, whose matrices are not in memory."""
    if vars(wrapper.get_base_layer()).get("offloaded") is not None:
        raise UserError(f"{wrapper.parameter_name} is offloaded: to merge, load the whole model and the adapter on it")
    if parametrize.is_parametrized(wrapper.get_base_layer(), wrapper.parameter_name):
        raise UserError(
            f"{wrapper.parameter_name} is in 4 bits: to merge, load the 16-bit model and the adapter on it"
        )
    _stock_merge(wrapper, *args, **kwargs)


def bring_to_slots(wrapper: Stock, config: peft.LoraConfig) -> None:
    """Gives the factors of offloaded experts memory where the experts are computed, and initial values.

    The parameters of [`~modeling_moe.offload.offload_experts`] are empty and on the meta device, and PEFT has moved the
    factors there.
    """
    offloaded = vars(wrapper.get_base_layer()).get("offloaded")
    if offloaded is None:
        return
    for adapter in [name for name, factor in wrapper.lora_A.items() if next(factor.parameters()).is_meta]:
        for factors in (wrapper.lora_A, wrapper.lora_B):
            factor: Any = factors[adapter]
            factor.to_empty(device=offloaded.cache.device)
            factor.reset_parameters()
        wrapper.reset_lora_parameters(adapter, config.init_lora_weights)


def _without_dropout(config: peft.LoraConfig) -> peft.LoraConfig:
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


class ParamWrapper(Stock):
    """PEFT's layer on a parameter, with `lora_dropout`, which PEFT refuses.

    The class has PEFT's name because PEFT compares names in places.
    """

    def __init__(self, base_layer, adapter_name, parameter_name, config, **kwargs):
        super().__init__(base_layer, adapter_name, parameter_name, _without_dropout(config), **kwargs)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs) -> None:
        """Adds an adapter to the layer."""
        super().update_layer(adapter_name, r, lora_alpha, _without_dropout(config), **kwargs)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        if Stock._activate_lora is _stock_activate:  # `disable` was called, and PEFT's own path would skip the dropout
            _refuse_dropout(self, active_adapters)
        with super()._activate_lora(active_adapters):
            yield


def wrap(target: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs) -> ParamWrapper | None:
    """Returns a layer on a matrix of experts, or None for any other target; PEFT calls it as a custom module."""
    module = target.get_base_layer() if isinstance(target, Stock) else target
    if parameter_name not in MATRICES or not is_experts(module) or reason_for_peft(module) is not None:
        return None
    return ParamWrapper(target, adapter_name, parameter_name, **kwargs)
