# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module puts matrices into bitsandbytes' 4-bit format piece by piece.

bitsandbytes scales each block of 64 numbers by the block's largest magnitude, so pieces of whole blocks give the bytes of
the whole tensor. With compressed statistics it then holds the scales, less the mean of all of them, in 8 bits, one fp32 scale
for each 256 (QLoRA, arXiv:2305.14314); this is done once all pieces are there.

# P numbers of all experts' matrices together
"""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from ..utils.errors import UserError


QUANT_TYPES = ("nf4", "fp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# numbers that share a scale, and scales that share a scale of their own; bitsandbytes' defaults
BLOCK, SCALES_BLOCK = 64, 256


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
            start = end
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


def dequantize(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Returns the numbers of a tensor in 4 bits, in the shape and the dtype of bitsandbytes' `QuantState`.

    They are dequantized as one row. bitsandbytes 0.50 takes wrong scales on CPUs for matrices whose rows are no multiple of a
    block: 160 columns come out with 69 % relative error, and one row with 9 %, which is the error of 4 bits.
    """
    row = copy.copy(state)
    row.shape = torch.Size((math.prod(state.shape),))
    return load_bitsandbytes().functional.dequantize_4bit(packed, row).view(state.shape)


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
