# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module checks the header of a GGUF file, because the `gguf` library trusts every length that a file gives."""

import mmap
import struct
from pathlib import Path

from ..utils.errors import UserError


MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
# value type -> bytes of a value
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# least bytes of a metadata entry (key length, type) and of a tensor's entry (name length, dimensions, type, offset)
SMALLEST_ENTRY, SMALLEST_TENSOR = 12, 24


class _Cursor:
    """A read position in a mapped file; a step beyond the end of the file raises an error."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.at = file, data, 0

    def skip(self, count: int, what: str) -> None:
        """Advances by `count` bytes."""
        if count > len(self.data) - self.at:
            raise UserError(
                f"{self.file} cannot be read as a GGUF file: {what} has {count:,} bytes where "
                f"{len(self.data) - self.at:,} are left; download it again"
            )
        self.at += count

    def number(self, code: str, what: str) -> int:
        """Reads an unsigned little-endian number of 4 bytes (`I`) or 8 bytes (`Q`)."""
        start = self.at
        self.skip(struct.calcsize(code), what)
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def string(self, what: str) -> str:
        """Reads a string with a length before it; bytes that are not UTF-8 are replaced."""
        length = self.number("Q", what)
        start = self.at
        self.skip(length, what)
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> None:
        """Advances over a metadata value of type `kind`."""
        if kind == STRING:
            self.skip(self.number("Q", key), key)
        elif kind == ARRAY:
            self.array(key)
        elif kind in WIDTHS:
            self.skip(WIDTHS[kind], key)
        else:
            raise UserError(f"{self.file} cannot be read as a GGUF file: {key} has the unknown type {kind}")

    def array(self, key: str) -> None:
        """Advances over an array, after checking that an array of this length fits into the file."""
        kind, length = self.number("I", key), self.number("Q", key)
        if kind == ARRAY:
            raise UserError(
                f"{self.file} cannot be read as a GGUF file: {key} is an array of arrays, which no model has"
            )
        if kind != STRING:
            if kind not in WIDTHS:
                raise UserError(f"{self.file} cannot be read as a GGUF file: {key} has the unknown type {kind}")
            self.skip(length * WIDTHS[kind], key)
            return
        if 8 * length > len(self.data) - self.at:
            self.skip(8 * length, key)
        for _ in range(length):
            self.skip(self.number("Q", key), key)


def refuse_damaged_header(file: Path) -> None:
    """Refuses a GGUF file with a length that exceeds the file, an array of arrays, or too few bytes for the entries.

    Raises:
        UserError: names the damaged entry.
    """
    if file.stat().st_size < len(MAGIC) + 20:
        raise UserError(f"{file} cannot be read as a GGUF file: it has {file.stat().st_size} bytes; download it again")
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(MAGIC)] != MAGIC:
            raise UserError(f"{file} cannot be read as a GGUF file: it does not begin with GGUF; name another file")
        walk = _Cursor(file, data)
        walk.skip(len(MAGIC), "the file")
        version = walk.number("I", "the version")
        if version not in (2, 3):
            raise UserError(f"{file} cannot be read as a GGUF file: its version is {version}, only 2 and 3 are read")
        tensors, entries = walk.number("Q", "the header"), walk.number("Q", "the header")
        if tensors * SMALLEST_TENSOR + entries * SMALLEST_ENTRY > len(data):
            raise UserError(
                f"{file} cannot be read as a GGUF file: {tensors:,} tensors and {entries:,} entries do not fit into "
                f"{len(data):,} bytes; download it again"
            )
        for _ in range(entries):
            key = walk.string("a name")
            walk.value(walk.number("I", key), key)
        for _ in range(tensors):
            name = walk.string("a tensor's name")
            dimensions = walk.number("I", name)
            walk.skip(8 * dimensions + 12, name)
