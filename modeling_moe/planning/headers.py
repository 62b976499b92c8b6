# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module compares the headers of a checkpoint's files with the model that config.json describes."""

from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoints import open_source
from ..utils.errors import UserError
from .simulation import SimulatedModel


# a checkpoint with tensors of other dtypes is quantised, and packs several numbers into an element
PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool}


class Headers(NamedTuple):
    """What the headers of a checkpoint's files say.

    Attributes:
        nbytes: bytes of all tensors on disk.
        params: number of elements of all tensors on disk.
        quantised: whether some tensors are neither floats of 16, 32 or 64 bits nor integers of 64 bits.
    """

    nbytes: int
    params: int
    quantised: bool


def check_headers(folder: Path, simulated: SimulatedModel) -> Headers | None:
    """Reads the headers of a checkpoint, and refuses tensors that cannot be those of the model of config.json.

    Tensors with a parameter's name must have the parameter's shape, and together the tensors must have at least the
    model's number of parameters. A checkpoint may hold more: copies of shared matrices, and layers that transformers
    leaves out. A quantised checkpoint is not compared.

    Args:
        folder: folder of the checkpoint.
        simulated: the model, without an adapter.

    Returns:
        What the headers say; None if the folder holds no safetensors files.

    Raises:
        UserError: names the tensor, gives both numbers, or says which file is damaged or missing.
    """
    if not any(folder.glob("*.safetensors*")):
        return None
    state = open_source(folder).state
    headers = Headers(
        nbytes=sum(_numel(tensor.shape) * tensor.dtype.itemsize for tensor in state.values()),
        params=sum(_numel(tensor.shape) for tensor in state.values()),
        quantised=any(tensor.dtype not in PLAIN for tensor in state.values()),
    )
    if headers.quantised:
        return headers
    expected = {name: tuple(parameter.shape) for name, parameter in simulated.model.named_parameters()}
    for name, tensor in state.items():
        if name in expected and tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"{folder} has {name} of shape {tuple(tensor.shape)} where config.json asks for {expected[name]}: the two "
                "do not belong together, download both again"
            )
    asked = sum(parameter.numel() for parameter in simulated.model.parameters())
    if headers.params < asked:
        raise UserError(
            f"the files in {folder} hold {headers.params:,} parameters where config.json asks for {asked:,}: the two do not "
            "belong together, download both again"
        )
    return headers


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
