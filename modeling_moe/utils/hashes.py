# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""`SHA256SUMS` lists the hashes of a folder's files in the format of the `sha256sum` command."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from .atomic import is_plain, write_text
from .errors import UserError


SUMS_NAME = "SHA256SUMS"
# bytes that are read at once
BLOCK = 1 << 24


def hash_file(file: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Returns the SHA-256 of a file in hex.

    Args:
        file: file to read.
        advance: receives the number of bytes after each read, for a progress bar.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """Returns file names to hashes as listed in the folder's `SHA256SUMS`; an empty dictionary if there is no such file.

    Raises:
        UserError: if a line is not in the format of `sha256sum`, or names a file outside the folder.
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
        folder: folder of the hashed files.
        sums: file names relative to `folder`, to SHA-256 in hex.
    """
    write_text(folder / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
