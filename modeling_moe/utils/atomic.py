# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Small files are written whole or not at all, and names in a list of files stay within the list's folder."""

import os
from pathlib import Path, PurePath


def part_of(file: Path) -> Path:
    """Where a file grows; of each process its own, so that two of them cannot mix their bytes."""
    return file.with_name(f"{file.name}.{os.getpid()}.part")


def write_text(file: Path, text: str) -> None:
    """Writes a small file, in UTF-8, whole or not at all."""
    part = part_of(file)
    try:
        with open(part, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_plain(name: object) -> bool:
    """Whether `name` is a text that names a file in a folder, or in a folder there, without `..` and not from the root."""
    return (
        isinstance(name, str)
        and bool(name.strip("."))
        and "\\" not in name
        and "\0" not in name
        and not PurePath(name).is_absolute()
        and ".." not in PurePath(name).parts
    )
