# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""`SHA256SUMS` holds the hashes of a result's files, in the format of `sha256sum`."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from .atomic import is_plain, write_text
from .errors import UserError


SUMS_NAME = "SHA256SUMS"
BLOCK = 1 << 24


def hash_file(file: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hex; `advance` takes the number of bytes just read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """File names to hashes, as the folder's `SHA256SUMS` has them; empty if there is none.

    Raises:
        UserError: if a line of it is none of `sha256sum`'s, or names a file outside the folder.
    """
    sums = {}
    file = folder / SUMS_NAME
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if not match or not is_plain(match[2].removeprefix("./")):
            raise UserError(f"{file} has a line that sha256sum did not write, {line!r}: write the file again")
        sums[match[2].removeprefix("./")] = match[1].lower()
    return sums


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Writes `SHA256SUMS`, whole or not at all.

    Args:
        folder: of the files.
        sums: names, relative to it, to SHA-256 in hex.
    """
    write_text(folder / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
