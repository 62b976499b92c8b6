# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The bytes of a checkpoint's files, compared with the hashes beside them, tell one source from another."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserError
from ..utils.hashes import SUMS_NAME, hash_file, read_sums
from ..utils.progress import byte_progress


def fingerprint(folder: str | Path, names: Sequence[str], progress: bool = True) -> dict[str, str]:
    """Reads files whole, for neither size nor time of a file tells that its bytes changed.

    Args:
        folder: of the files.
        names: relative to it.
        progress: show a progress bar on stderr.

    Returns:
        Names to SHA-256 in hex.

    Raises:
        UserError: names the first file that is missing, or differs from the folder's `SHA256SUMS`.
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
    """Compares the safetensors files that the folder's `SHA256SUMS` lists with their hashes.

    Returns:
        Names of the files that were compared; none where the folder has no `SHA256SUMS`.

    Raises:
        UserError: names the first file that is missing or differs.
    """
    folder = Path(folder)
    names = [name for name in read_sums(folder) if name.endswith(".safetensors")]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{SUMS_NAME} lists {name}, which {folder} lacks: download it again")
    return list(fingerprint(folder, names, progress))
