# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The safetensors format, read and written with plain file access: a mapped file would count as memory."""

import json
import math
import struct
from functools import partial
from pathlib import Path

import torch

from ..cli import UserError
from .tensors import Index, LazyTensor, State


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# a tensor larger than this is written in pieces of this size, and its columns are read through a buffer of it
BLOCK = 1 << 24


def read_tensors(file: Path) -> State:
    """The tensors of a safetensors file, of which only the header is read.

    Raises:
        UserError: if the file is damaged, or has a dtype that torch lacks.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} is truncated or no safetensors file ({size} bytes): download it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{file} is no safetensors file, its header is not JSON: download it again") from error
    header.pop("__metadata__", None)
    start = 8 + length
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise UserError(f"{file} has {size} bytes where its header asks for {end}: download it again")
    return {name: _tensor(file, name, entry, start) for name, entry in header.items()}


def _tensor(file: Path, name: str, entry: dict, start: int) -> LazyTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(
            f"{name} in {file} has dtype {entry['dtype']}, which cannot be read: dequantise the source first"
        )
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{name} in {file} has {last - first} bytes, which do not fit its shape: download the file again"
        )
    whole = LazyTensor(shape, dtype, partial(_read, file, start + first, shape, dtype))
    if whole.nbytes <= BLOCK or shape[0] == 1:
        return whole
    rows = max(1, BLOCK * shape[0] // whole.nbytes)
    parts = tuple(whole[row : row + rows] for row in range(0, shape[0], rows))
    return LazyTensor(shape, dtype, whole.load, parts)


def _read(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, index: Index) -> torch.Tensor:
    """The part `tensor[index]`; rows are read whole, and where only some columns are asked for, block by block."""
    if not shape:
        return _read_rows(file, offset, (1,), dtype).reshape(())
    ranges = [range(size)[part] for size, part in zip(shape, index + (slice(None),) * len(shape), strict=False)]
    rows, columns = ranges[0], tuple(slice(part.start, part.stop) for part in ranges[1:])
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    offset += rows.start * row_bytes
    if all(len(part) == size for part, size in zip(ranges[1:], shape[1:], strict=True)):
        return _read_rows(file, offset, (len(rows), *shape[1:]), dtype)
    result = torch.empty([len(part) for part in ranges], dtype=dtype)
    step = max(1, BLOCK // max(1, row_bytes))
    for row in range(0, len(rows), step):
        block = (min(step, len(rows) - row), *shape[1:])
        result[row : row + step] = _read_rows(file, offset + row * row_bytes, block, dtype)[(slice(None), *columns)]
    return result


def _read_rows(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    with open(file, "rb") as stream:
        stream.seek(offset)
        if stream.readinto(buffer.numpy()) != len(buffer):
            raise UserError(f"{file} became shorter while it was read: download it again")
    return buffer.view(dtype).reshape(shape)


def make_header(tensors: State) -> bytes:
    """The header of a file with these tensors one after another, as transformers asks for it, its length included."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
