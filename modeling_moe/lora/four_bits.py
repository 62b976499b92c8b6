# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module puts matrices into bitsandbytes' 4-bit format piece by piece, and shows PEFT such matrices whole.

bitsandbytes scales each block of 64 numbers by the block's largest magnitude, so pieces of whole blocks give the bytes of
the whole tensor. With compressed statistics it then holds the scales, less the mean of all of them, in 8 bits, one fp32 scale
for each 256 (QLoRA, arXiv:2305.14314); this is done once all pieces are there.

# E experts, M columns of a matrix, N rows of a matrix, P numbers of all experts' matrices together
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from peft import LoraConfig, LoraModel
from torch import nn
from torch.nn.utils import parametrize

from ..utils.errors import UserError
from .layers import MATRICES, is_experts


QUANT_TYPES = ("nf4", "fp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# numbers that share a scale, and scales that share a scale of their own; bitsandbytes' defaults
BLOCK, SCALES_BLOCK = 64, 256
_stock_inject = LoraModel._inject_parameters


class FourBit(NamedTuple):
    """A tensor in bitsandbytes' 4-bit format.

    Attributes:
        packed: (P / 2, 1) uint8, two numbers in a byte.
        state: bitsandbytes' `QuantState`: scales, table of the sixteen levels, and the tensor's shape and dtype.
    """

    packed: torch.Tensor
    state: Any


def load_bitsandbytes() -> Any:
    """Returns the module bitsandbytes.

    Raises:
        UserError: if bitsandbytes is missing or too old.
    """
    try:
        import bitsandbytes
        import bitsandbytes.nn.parametrize
    except ImportError as error:
        raise UserError("bitsandbytes is not installed: pip install 'modeling-moe[4bit]'") from error
    if Version(bitsandbytes.__version__) < Version("0.50"):
        # older releases never free what they dequantized under checkpointing
        raise UserError(
            f"bitsandbytes is {bitsandbytes.__version__}: pip install 'modeling-moe[4bit]' for a newer one"
        )
    return bitsandbytes


def check_quant_type(quant_type: Any) -> None:
    """Raises UserError unless `quant_type` is one of bitsandbytes' 4-bit types."""
    if quant_type not in QUANT_TYPES:
        raise UserError(f"quant_type is {quant_type!r}: choose {' or '.join(QUANT_TYPES)}")


@torch.no_grad()
def quantize_pieces(
    pieces: Iterable[torch.Tensor], shape: torch.Size, quant_type: str, compress_statistics: bool
) -> FourBit:
    """Quantizes a tensor of which one piece at a time is in memory; the result equals bitsandbytes' of the whole tensor.

    Args:
        pieces: consecutive pieces of the flattened tensor, of one dtype and device. Pieces whose length is no multiple of 64
            are joined until it is.
        shape: shape of the whole tensor.
        quant_type: `"nf4"` or `"fp4"`.
        compress_statistics: whether to hold the scales in 8 bits.

    Raises:
        ValueError: if the pieces together have another number of elements than `shape`.
    """
    functional = load_bitsandbytes().functional
    numbers, start, packed, scales = math.prod(shape), 0, torch.empty(0), torch.empty(0)
    piece = torch.empty(0)
    for piece in _of_whole_blocks(pieces):
        four, state = functional.quantize_4bit(piece, blocksize=BLOCK, quant_type=quant_type)
        if start == 0:
            packed = torch.empty(math.ceil(numbers / 2), 1, dtype=torch.uint8, device=piece.device)
            scales = torch.empty(math.ceil(numbers / BLOCK), dtype=torch.float32, device=piece.device)
        end = start + piece.numel()
        if end > numbers:
            break
        packed[start // 2 : start // 2 + len(four)] = four
        scales[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax
        start = end
    if start != numbers:
        raise ValueError(f"the pieces of a matrix do not have the {numbers} numbers of its shape {tuple(shape)}")
    code = functional.get_4bit_type(quant_type, device=packed.device)
    fields = {"shape": shape, "dtype": piece.dtype, "blocksize": BLOCK, "code": code, "quant_type": quant_type}
    if compress_statistics:
        mean = scales.mean()
        scales, nested = functional.quantize_blockwise(scales - mean, blocksize=SCALES_BLOCK)
        fields |= {"offset": mean, "state2": nested}
    return FourBit(packed, functional.QuantState(absmax=scales, **fields))


def _of_whole_blocks(pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the pieces flattened, each but the last a multiple of the block long."""
    kept: list[torch.Tensor] = []
    for piece in pieces:
        kept.append(piece.reshape(-1))
        if sum(part.numel() for part in kept) % BLOCK == 0:
            whole = kept[0] if len(kept) == 1 else torch.cat(kept)
            kept.clear()
            yield whole
    if kept:
        yield torch.cat(kept)


def hold(module: nn.Module, name: str, matrix: FourBit) -> None:
    """Replaces a matrix of experts by its 4 bits; reading the matrix dequantizes it from then on."""
    parametrizations = load_bitsandbytes().nn.parametrize
    setattr(module, name, nn.Parameter(matrix.packed, requires_grad=False))
    state = matrix.state.as_dict()
    parametrizations.replace_parameter_4bit_prequantized(module, name, state, matrix.packed.device)
    module.get_submodule(f"parametrizations.{name}.0").register_forward_pre_hook(_follow)


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
    parametrized_class, parametrizations = type(module), module._modules.pop("parametrizations")
    # torch derives a class with a property for each parametrized name
    module.__class__ = parametrized_class.__bases__[0]
    for name, entries in parametrizations.items():
        state = entries[0].quant_state
        one = torch.zeros((), dtype=state.dtype, device=entries.original.device)
        module._parameters[name] = nn.Parameter(one.expand(state.shape), requires_grad=False)
    return parametrized_class, parametrizations


def inject_parameters(
    tuner: LoraModel, peft_config: LoraConfig, model: nn.Module, *args: Any, **kwargs: Any
) -> list[str]:
    """Adds layers as PEFT's `_inject_parameters` does, which does not find parameters that are in 4 bits."""
    with shown_whole(model):
        return _stock_inject(tuner, peft_config, model, *args, **kwargs)
