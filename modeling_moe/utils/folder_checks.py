# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These checks keep a command from overwriting files that no run of this package wrote."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from .errors import UserError
from .hashes import SUMS_NAME, hash_file
from .progress import byte_progress


LOCK_NAME = ".lock"
# a progress bar is shown from this number of bytes on
SHOWN = 10**9


def refuse_overlap(output_dir: str | Path, source: str | Path, name: str = "model_name_or_path") -> None:
    """Refuses an output folder that equals, contains or lies in a folder that will be read.

    Links, `..` and `~` are resolved first.

    Args:
        output_dir: folder to be written; it need not exist.
        source: folder or file to be read; a name that does not exist on this machine passes.
        name: argument that gave `source`, for the message.

    Raises:
        UserError: if one of the two contains the other.
    """
    source = os.path.expanduser(source)
    if not os.path.exists(source):
        return
    output, read = real_path(output_dir), Path(os.path.realpath(source))
    for inner, outer in ((output, read), (read, output)):
        if any(same_folder(folder, outer) for folder in (inner, *inner.parents)):
            raise UserError(
                f"output_dir {output_dir} and {name} {source} contain each other: choose another output_dir"
            )


def refuse_foreign(folder: str | Path, patterns: Iterable[str], remedy: str = "choose another output_dir") -> None:
    """Refuses to overwrite a folder that holds files other than those that a command writes there.

    Args:
        folder: folder to be overwritten; a missing or empty folder passes.
        patterns: shell patterns of the file and folder names that the command writes, such as `checkpoint-*`.
        remedy: end of the message.

    Raises:
        UserError: names the first file or folder that no pattern matches.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file: {remedy}")
    patterns = list(patterns)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_symlink() or not any(fnmatch(entry.name, pattern) for pattern in patterns):
            raise UserError(f"output_dir {folder} holds {entry.name}, which --overwrite must not delete: {remedy}")


def refuse_unlisted(folder: Path, sums: dict[str, str], but: Sequence[Path] = ()) -> None:
    """Refuses a folder with a file that is not listed in `sums` or whose hash differs.

    Args:
        folder: folder to check, with all folders in it; every listed file is read.
        sums: file names to SHA-256 in hex.
        but: folders that are not checked.

    Raises:
        UserError: names the first file that is not listed or differs.
    """
    parents = {str(parent) for name in sums for parent in PurePosixPath(name).parents}
    listed = []
    for file in entries(folder, but):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() or (name not in parents if file.is_dir() else name not in sums and name != SUMS_NAME):
            raise UserError(
                f"{folder} holds {name}, which no run of this package wrote: move it, or choose another folder"
            )
        listed += [name] if name in sums else []
    nbytes = sum((folder / name).stat().st_size for name in listed)
    with byte_progress("checking", nbytes, show=nbytes > SHOWN) as advance:
        for name in listed:
            if hash_file(folder / name, advance) != sums[name]:
                raise UserError(
                    f"{folder / name} was changed after a run of this package wrote it: move it, or choose another folder"
                )


def entries(folder: Path, but: Sequence[Path] = ()) -> Iterator[Path]:
    """Yields files and folders below `folder`; links are not followed, and lock files are left out."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry not in but and not _is_lock(entry):
            yield entry
            if entry.is_dir() and not entry.is_symlink():
                yield from entries(entry)


def _is_lock(file: Path) -> bool:
    """Returns whether a file is the empty lock file that a killed run left behind."""
    return file.name == LOCK_NAME and not file.is_symlink() and file.is_file() and not file.stat().st_size


def real_path(output_dir: str | Path) -> Path:
    """Returns the absolute path of an output folder, with links, `..` and `~` resolved.

    Raises:
        UserError: if the path is empty.
    """
    if not str(output_dir):
        raise UserError("output_dir is empty: name a folder")
    # no shell expands a `~` that stands in a recipe
    return Path(os.path.realpath(os.path.expanduser(output_dir)))


def same_folder(first: Path, second: Path) -> bool:
    """Returns whether two paths name one folder; a bind mount can give a folder two paths."""
    return first == second or (first.exists() and second.exists() and os.path.samefile(first, second))


def is_record(file: Path) -> bool:
    """Returns whether a file is a `conversion.json` that this package wrote."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("recipe"), dict) and "modeling_moe_version" in record
