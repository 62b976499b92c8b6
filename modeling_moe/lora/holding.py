# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds matrices of experts in 4 bits inside a model, and shows PEFT such matrices whole.

A matrix is dequantized when it is read, once in a forward pass. Backward dequantizes it again, so no copy is kept.

# E experts, M columns of a matrix, N rows of a matrix
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, LoraModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from .four_bits import FourBit, dequantize, load_bitsandbytes
from .layers import MATRICES, Stock, bring_to_slots, is_experts


_stock_inject = LoraModel._inject_parameters


def hold_experts(module: nn.Module, matrices: Iterable[tuple[str, FourBit]]) -> None:
    """Replaces matrices of `module` by their 4 bits, one after another, and makes backward dequantize them again."""
    for name, matrix in matrices:
        _hold(module, name, matrix)
    module.forward = partial(_forward, module, module.forward)


def _hold(module: nn.Module, name: str, matrix: FourBit) -> None:
    """Replaces a matrix of experts by its 4 bits; reading the matrix dequantizes it from then on."""
    parametrizations = load_bitsandbytes().nn.parametrize
    setattr(module, name, nn.Parameter(matrix.packed, requires_grad=False))
    state = matrix.state.as_dict()
    parametrizations.replace_parameter_4bit_prequantized(module, name, state, matrix.packed.device)
    parametrization: Any = module.get_submodule(f"parametrizations.{name}.0")
    parametrization.register_forward_pre_hook(_follow)
    parametrization.forward = partial(_dequantize, parametrization)


@torch.no_grad()
def _dequantize(parametrization: Any, packed: torch.Tensor) -> torch.Tensor:
    return dequantize(packed, parametrization.quant_state)


def _follow(parametrization: Any, inputs: tuple[torch.Tensor]) -> None:
    """Moves the scales to the device of the 4-bit numbers; the scales are no buffers, so `Module.to` leaves them."""
    device = inputs[0].device
    if parametrization.quant_state.absmax.device != device:
        parametrization.quant_state.to(device)


@contextmanager
def shown_whole(model: nn.Module) -> Iterator[None]:
    """Shows, inside the block, each matrix in 4 bits as an ordinary parameter with the whole shape, which holds one number.

    PEFT, and what counts parameters, then see names and shapes of the 16-bit model; nobody may read values.
    """
    hidden = [(module, *_hide(module)) for module in model.modules() if _holds_4bit(module)]
    try:
        yield
    finally:
        for module, parametrized_class, parametrizations in hidden:
            for name in parametrizations:
                del module._parameters[name]
            module.__class__ = parametrized_class
            module._modules["parametrizations"] = parametrizations


def is_in_4bit(model: nn.Module) -> bool:
    """Returns whether a model holds experts in 4 bits."""
    return any(_holds_4bit(module) for module in model.modules())


def _holds_4bit(module: nn.Module) -> bool:
    return is_experts(module) and any(parametrize.is_parametrized(module, name) for name in MATRICES)


def _hide(module: nn.Module) -> tuple[type, Any]:
    """Takes the parametrizations of `module` off, and returns the class and the parametrizations to put back."""
    parametrized_class: type = type(module)
    parametrizations: Any = module._modules.pop("parametrizations")
    # torch derives a class with a property for each parametrized name, and FSDP2 may derive another one from that
    classes, name = parametrized_class.__mro__, next(iter(parametrizations))
    module.__class__ = classes[[name in vars(each) for each in classes].index(True) + 1]
    for name, entries in parametrizations.items():
        state = entries[0].quant_state
        one = torch.zeros((), dtype=state.dtype, device=entries.original.device)
        module._parameters[name] = nn.Parameter(one.expand(state.shape), requires_grad=False)
    return parametrized_class, parametrizations


def inject_parameters(
    tuner: LoraModel, peft_config: LoraConfig, model: nn.Module, *args: Any, **kwargs: Any
) -> list[str]:
    """Adds layers as PEFT's `_inject_parameters` does, also to experts in 4 bits and to offloaded experts."""
    with shown_whole(model):
        targeted = _stock_inject(tuner, peft_config, model, *args, **kwargs)
    for wrapper in model.modules():
        if isinstance(wrapper, Stock):
            bring_to_slots(wrapper, peft_config)
    return targeted


class _Matrix(NamedTuple):
    """The place of a matrix or a transposed matrix among the tensors saved for backward.

    Attributes:
        module: the experts.
        name: name of the matrix.
        size: size of the saved view.
        stride: stride of the saved view.
    """

    module: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]

    def dequantize(self) -> torch.Tensor:
        """Dequantizes the matrix again and returns the saved view of it."""
        return getattr(self.module, self.name).as_strided(self.size, self.stride)


def _forward(module: nn.Module, forward: Any, *args, **kwargs) -> torch.Tensor:
    """Calls `forward`, and saves no dequantized matrix of `module` for backward, which dequantizes again."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    names = [name for name in MATRICES if parametrize.is_parametrized(module, name)]
    # torch calls only the innermost hooks, so the hooks of checkpointing are called from here
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    # the tensor itself may hold the graph, so a detached one is packed
    outer_pack, outer_unpack = outer or (torch.Tensor.detach, lambda tensor: tensor)

    def pack(tensor: torch.Tensor) -> Any:
        for name in names:
            # bitsandbytes caches the dequantized matrix while the forward pass runs
            weight = getattr(module, name)
            if _same_storage(tensor, weight) and tensor.numel() == weight.numel():
                return _Matrix(module, name, tensor.size(), tensor.stride())
        return outer_pack(tensor)

    def unpack(packed: Any) -> torch.Tensor:
        return packed.dequantize() if isinstance(packed, _Matrix) else outer_unpack(packed)

    with saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)


def _same_storage(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
