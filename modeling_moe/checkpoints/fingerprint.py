# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module hashes the files of a checkpoint and compares the hashes with those in `SHA256SUMS`."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserError
from ..utils.hashes import SUMS_NAME, hash_file, read_sums
from ..utils.progress import byte_progress


def fingerprint(folder: str | Path, names: Sequence[str], progress: bool = True) -> dict[str, str]:
    """Hashes files of a folder; only the bytes prove that a file is unchanged, neither size nor time does.

    Args:
        folder: folder that holds the files.
        names: paths relative to `folder`.
        progress: whether to show a progress bar on stderr.

    Returns:
        File names to SHA-256 in hex.

    Raises:
        UserError: names the first file that is missing or differs from the folder's `SHA256SUMS`.
    """
    folder = Path(folder)
    listed, sums = read_sums(folder), {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}: download it again")
    with byte_progress("checking", sum((folder / name).stat().st_size for name in names), progress) as advance:
        for name in names:
            sums[name] = hash_file(folder / name, advance)
            if listed.get(name, sums[name]) != sums[name]:
                raise UserError(
                    f"{folder / name} differs from its hash in {SUMS_NAME}: download it again, or remove {SUMS_NAME} "
                    "if it was changed on purpose"
                )
    return sums


def check_hashes(folder: str | Path, progress: bool = True) -> list[str]:
    """Compares the safetensors files of a folder with the hashes that the folder's `SHA256SUMS` lists.

    Args:
        folder: folder that holds the files and `SHA256SUMS`.
        progress: whether to show a progress bar on stderr.

    Returns:
        Names of the compared files; an empty list if the folder has no `SHA256SUMS`.

    Raises:
        UserError: names the first file that is missing or differs.
    """
    folder = Path(folder)
    names = [name for name in read_sums(folder) if name.endswith(".safetensors")]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{SUMS_NAME} lists {name}, which {folder} lacks: download it again")
    return list(fingerprint(folder, names, progress))
