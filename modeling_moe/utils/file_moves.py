# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module moves and deletes the files of a result in an order from which a killed run can continue."""

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from .hashes import SUMS_NAME


def arrival_order(name: str) -> tuple[int, str]:
    """Returns the sort key for files that arrive: the files that make a folder a loadable model come last."""
    last = ("model.safetensors.index.json", "config.json", "conversion.json")
    return (last.index(name) if name in last else -1, name)


def departure_order(name: str) -> tuple[int, str]:
    """Returns the sort key for files that leave: the files that make a folder a loadable model go first."""
    first = ("config.json", "model.safetensors.index.json")
    return (first.index(name) if name in first else len(first), name)


def move(source: Path, target: Path) -> None:
    """Moves a file; the target appears whole or not at all, also between two file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source, target.with_name(f".{target.name}.moving"))
        os.replace(target.with_name(f".{target.name}.moving"), target)
        source.unlink()


def move_all(source: Path, target: Path, names: Sequence[str]) -> None:
    """Moves files from one folder to another in the given order, and removes folders that become empty.

    `SHA256SUMS` moves last: after a kill, only this list proves which of the remaining files a run wrote.
    """
    for name in names:
        if (source / name).exists():
            move(source / name, target / name)
    _remove_empty(source, names)
    if (source / SUMS_NAME).exists():
        move(source / SUMS_NAME, target / SUMS_NAME)
    _remove_empty(source, ())


def delete_all(folder: Path, names: Sequence[str]) -> None:
    """Deletes files of a folder, then folders that became empty; `SHA256SUMS` goes last, as in [`move_all`]."""
    for name in sorted(names, key=departure_order):
        if name != SUMS_NAME:
            (folder / name).unlink(missing_ok=True)
    _remove_empty(folder, names)
    if SUMS_NAME in names:
        (folder / SUMS_NAME).unlink(missing_ok=True)
    _remove_empty(folder, ())


def _remove_empty(folder: Path, names: Iterable[str]) -> None:
    """Removes `folder` and the parents of the named files, as far as they are empty."""
    parents = {folder / parent for name in names for parent in PurePosixPath(name).parents}
    for parent in sorted({folder, *parents}, key=lambda path: -len(path.parts)):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
