# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads single experts from a checkpoint whose experts are in bitsandbytes' 4-bit format.

bitsandbytes holds a matrix (E, N, M) as one row of packed numbers, with a scale for each 64. One expert's numbers are a part of
the row, so that one expert can be read and dequantized alone, with the bits of the dequantized whole.

# E experts, M columns of a matrix, N rows of a matrix
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints.lazy_tensor import Index
from ..utils.errors import UserError
from .pieces import Piece, Stored
from .tracing import TracedTensor


@dataclass(frozen=True)
class FourBitPiece(Piece):
    """A matrix of experts (E, N, M) in 4 bits, of which whole experts are read; `dtype` is that of the dequantized numbers.

    Attributes:
        packed: (P / 2, 1) uint8 in a file, two of the P numbers in a byte.
        scales: fp32 scale of each block of numbers, in memory: half a bit for each number.
        state: bitsandbytes' `QuantState` of the matrix.
    """

    packed: Stored
    scales: torch.Tensor = field(hash=False, compare=False)
    state: Any = field(hash=False, compare=False)

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Reads experts one after another and dequantizes them.

        Raises:
            ValueError: for a part of an expert.
        """
        if tuple(index[1:]) != self.full()[1:]:
            raise ValueError("an expert in 4 bits is read whole")
        if out.is_meta:
            return
        for place, expert in enumerate(range(index[0].start, index[0].stop)):
            out[place].copy_(self._expert(expert))

    def _expert(self, expert: int) -> torch.Tensor:
        """Returns one expert's matrix (N, M)."""
        # PEFT, which this package imports, takes seconds to import
        from ..lora import dequantize

        numbers, block = math.prod(self.shape[1:]), self.state.blocksize
        half = numbers // 2
        packed = torch.empty(half, 1, dtype=torch.uint8, device="cpu")
        self.packed.read_into((slice(expert * half, (expert + 1) * half), slice(0, 1)), packed)
        scales = self.scales[expert * numbers // block : (expert + 1) * numbers // block]
        state = copy.copy(self.state)
        state.absmax, state.nested, state.shape, state.dtype = scales, False, torch.Size(self.shape[1:]), self.dtype
        return dequantize(packed, state)


def without_quantization(config: PreTrainedConfig, name: Any) -> None:
    """Makes a configuration of a checkpoint in 4 bits that of the dequantized model.

    Raises:
        UserError: if linear layers are in 4 bits too.
    """
    if config.quantization_config.get("linear_layers"):
        raise UserError(
            f"{name} has linear layers in 4 bits, which are not dequantized here: quantize with linear_layers=False"
        )
    delattr(config, "quantization_config")


def joined(state: Mapping[str, TracedTensor], dtype: torch.dtype | None, name: Any) -> dict[str, TracedTensor]:
    """Returns the tensors of a checkpoint in 4 bits, with one tensor in the place of each matrix and its companions.

    Args:
        state: tensors of [`~modeling_moe.offload.tracing.traced_state`].
        dtype: dtype of the dequantized matrices; None for that of the matrices before they were quantized.
        name: folder or Hub name of the checkpoint, for messages.

    Raises:
        UserError: if a matrix is damaged, or an expert does not begin at a block of numbers with a scale of their own.
    """
    # PEFT, which this package imports, takes seconds to import
    from ..lora import COMPANIONS, state_of

    found = dict(state)
    for matrix in [key.removesuffix(".absmax") for key in state if key.endswith(".absmax")]:
        parts = {part: found.pop(f"{matrix}.{part}") for part in COMPANIONS if f"{matrix}.{part}" in found}
        packed = found[matrix].piece
        assert isinstance(packed, Stored)
        try:
            four = state_of({part: _read(tensor) for part, tensor in parts.items()}, packed.shape, packed.dtype)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            raise UserError(
                f"{matrix} of {name} cannot be read in 4 bits: {error}, download the checkpoint again"
            ) from error
        if math.prod(four.shape[1:]) % four.blocksize:
            raise UserError(
                f"{matrix} of {name} cannot be read expert by expert, because an expert's {math.prod(four.shape[1:])} numbers "
                f"are no multiple of {four.blocksize}: give the checkpoint in 16 bits"
            )
        found[matrix] = TracedTensor(FourBitPiece(tuple(four.shape), dtype or four.dtype, packed, _scales(four), four))
    return found


def _read(tensor: TracedTensor) -> torch.Tensor:
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    tensor.piece.read_into(tensor.piece.full(), out)
    return out


def _scales(state: Any) -> torch.Tensor:
    """Returns the scales in fp32, as bitsandbytes computes them from compressed ones."""
    from bitsandbytes import functional

    if not state.nested:
        return state.absmax.float()
    return (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
