# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The hashes of a checkpoint's shards, in the format of `sha256sum`."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from ..cli import UserError
from .progress import byte_progress


SUMS_NAME = "SHA256SUMS"
BLOCK = 1 << 24


def hash_file(file: Path, advance: Callable[[int], None]) -> str:
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
        UserError: if a line of it is none of `sha256sum`'s.
    """
    sums = {}
    file = folder / SUMS_NAME
    for line in file.read_text().splitlines() if file.exists() else ():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if not match:
            raise UserError(f"{file} has a line that sha256sum did not write, {line!r}: write the file again")
        sums[match[2].removeprefix("./")] = match[1].lower()
    return sums


def check_hashes(folder: str | Path, progress: bool = True) -> list[str]:
    """Compares the safetensors files that the folder's `SHA256SUMS` lists with their hashes.

    Returns:
        Names of the files that were compared; none where the folder has no `SHA256SUMS`.

    Raises:
        UserError: names the first file that is missing or differs.
    """
    folder = Path(folder)
    sums = {name: value for name, value in read_sums(folder).items() if name.endswith(".safetensors")}
    for name in sums:
        if not (folder / name).is_file():
            raise UserError(f"{SUMS_NAME} lists {name}, which {folder} lacks: download it again")
    with byte_progress("checking", sum((folder / name).stat().st_size for name in sums), progress) as advance:
        for name, expected in sums.items():
            if hash_file(folder / name, advance) != expected:
                raise UserError(
                    f"{folder / name} differs from its hash in {SUMS_NAME}: download it again, or remove {SUMS_NAME} "
                    "if it was changed on purpose"
                )
    return list(sums)
