# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads and writes safetensors files with plain file access, because a mapped file counts as memory in use."""

import json
import math
import struct
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import UserError
from .damage import refuse_not_finite
from .lazy_tensor import Index, LazyTensor, Place, State


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
# bytes: a larger tensor is copied in pieces of this size, and columns are read through a buffer of this size
BLOCK = 1 << 24


def read_tensors(file: Path) -> State:
    """Returns the tensors of a safetensors file and reads only the file's header.

    The safetensors library checks the header: tensors neither overlap nor leave holes.

    Raises:
        UserError: if the file is damaged, or has a dtype that torch lacks.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} is truncated or no safetensors file ({size} bytes): download it again")
        try:
            # safe_open maps the file but reads only the header, so memory in use does not grow
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            held = _held_bytes(stream, length)
            if held is not None and held != size:
                raise UserError(
                    f"{file} has {size} bytes where its header asks for {held}: download it again"
                ) from error
            raise UserError(f"{file} is damaged or no safetensors file: {error}; download it again") from error
        stream.seek(8)
        header = json.loads(stream.read(length), object_pairs_hook=partial(_distinct, file))
    header.pop("__metadata__", None)
    return {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}


def _held_bytes(stream: BinaryIO, length: int) -> int | None:
    """Returns the file size in bytes that the header asks for, or None if the bytes are not a header."""
    stream.seek(8)
    try:
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        return None


def _distinct(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a header's dictionary; raises a UserError if a name occurs twice, which JSON readers accept."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file} has {twice} twice in its header: download it again")
    return dict(pairs)


def _tensor(file: Path, name: str, entry: dict, start: int) -> LazyTensor:
    """Makes a lazy tensor of a header's entry; `start` is the byte at which the file's tensors begin."""
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
    place = Place(file, start + first)
    whole = LazyTensor(shape, dtype, partial(_read, file, name, place.offset, shape, dtype), place=place)
    if whole.nbytes <= BLOCK or shape[0] == 1:
        return whole
    rows = max(1, BLOCK * shape[0] // whole.nbytes)
    parts = tuple(whole[row : row + rows] for row in range(0, shape[0], rows))
    return LazyTensor(shape, dtype, whole.load, parts, place)


def _read(
    file: Path, name: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype, index: Index
) -> torch.Tensor:
    """Reads the part `tensor[index]`: all columns of a row range directly, some columns block by block."""
    if not shape:
        return _read_rows(file, name, offset, (1,), dtype).reshape(())
    ranges = [range(size)[part] for size, part in zip(shape, index + (slice(None),) * len(shape), strict=False)]
    rows, columns = ranges[0], tuple(slice(part.start, part.stop) for part in ranges[1:])
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    offset += rows.start * row_bytes
    if all(len(part) == size for part, size in zip(ranges[1:], shape[1:], strict=True)):
        return _read_rows(file, name, offset, (len(rows), *shape[1:]), dtype)
    result = torch.empty([len(part) for part in ranges], dtype=dtype)
    step = max(1, BLOCK // max(1, row_bytes))
    for row in range(0, len(rows), step):
        block = (min(step, len(rows) - row), *shape[1:])
        result[row : row + step] = _read_rows(file, name, offset + row * row_bytes, block, dtype)[
            (slice(None), *columns)
        ]
    return result


def _read_rows(file: Path, name: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Reads a contiguous range of rows, of shape `shape`, at byte `offset`."""
    buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    with open(file, "rb") as stream:
        stream.seek(offset)
        if stream.readinto(buffer.numpy().data) != len(buffer):
            raise UserError(f"{file} became shorter while it was read: download it again")
    tensor = buffer.view(dtype).reshape(shape)
    refuse_not_finite(tensor, f"{name} in {file}", "the file is damaged, download it again")
    return tensor


def make_header(tensors: State) -> bytes:
    """Returns the header, with its length before it, of a file that holds these tensors one after another."""
    # transformers refuses a file whose metadata does not name the framework
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
