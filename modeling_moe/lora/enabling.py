# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module replaces six functions of PEFT by this package's, and puts PEFT's back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import peft
from peft import LoraModel
from peft.tuners.lora import model as peft_model
from peft.utils import ModulesToSaveWrapper
from transformers.utils import logging

from . import holding, layers, sharding


logger = logging.get_logger(__name__)


class Replacement(NamedTuple):
    """A function of this package that takes the place of one of PEFT's.

    Attributes:
        owner: the class or module of PEFT that holds the function.
        name: the function's name there.
        function: what takes the function's place.
    """

    owner: Any
    name: str
    function: Callable[..., Any]


REPLACEMENTS = (
    Replacement(layers.Stock, "_activate_lora", layers.activate_lora),
    Replacement(layers.Stock, "merge", layers.merge),
    Replacement(LoraModel, "_inject_parameters", holding.inject_parameters),
    Replacement(ModulesToSaveWrapper, "update", sharding.update),
    Replacement(peft_model, "add_lora_tp_hooks_dtensor", sharding.add_tp_hooks),
    Replacement(peft_model, "get_tp_plan_and_mesh", sharding.tp_plan_and_mesh),
)
# marks a function that the owner inherits
_INHERITED = object()
# PEFT's own functions while they are replaced
_replaced: list[tuple[Replacement, Any]] = []


def is_enabled() -> bool:
    """Returns whether PEFT uses this package's functions."""
    return bool(_replaced)


def enable() -> None:
    """Changes PEFT so that LoRA on experts computes low-rank products on the tokens; a second call does nothing.

    The change concerns all PEFT models of this process, earlier ones included. It also lets PEFT adapt models that
    `DistributedConfig` has split over processes, and refuse what would lose experts that are held in 4 bits.

    Example:
        >>> import modeling_moe.lora
        >>> modeling_moe.lora.enable()
    """
    if is_enabled():
        return
    for replacement in REPLACEMENTS:
        owner, name, function = replacement
        if hasattr(owner, name):
            _replaced.append((replacement, vars(owner).get(name, _INHERITED)))
            setattr(owner, name, function)
        else:
            logger.warning(
                f"PEFT {peft.__version__} has no {owner.__name__}.{name}: PEFT's own path computes LoRA on experts, which "
                "builds every expert's updated matrix in each forward pass. Install peft<0.22."
            )


def disable() -> None:
    """Puts PEFT's own functions back; PEFT then computes LoRA on experts of existing models too.

    Layers with `lora_dropout` on experts refuse to train from then on. Do not merge experts that are in 4 bits after
    this
    call: PEFT would add the update to a copy and lose it.
    """
    while _replaced:
        (owner, name, _), stock = _replaced.pop()
        if stock is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, stock)


@contextmanager
def peft_alone() -> Iterator[None]:
    """Computes LoRA on experts by PEFT's own path inside the block, to compare it with this package's."""
    was_enabled = is_enabled()
    disable()
    try:
        yield
    finally:
        if was_enabled:
            enable()
