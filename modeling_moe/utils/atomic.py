# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes small files whole or not at all, and checks that a file name stays within a folder."""

import os
from pathlib import Path, PurePath


def part_of(file: Path) -> Path:
    """Returns the temporary path of a file that is being written; the process id keeps two processes apart."""
    return file.with_name(f"{file.name}.{os.getpid()}.part")


def write_text(file: Path, text: str) -> None:
    """Writes a small UTF-8 file; a reader sees either the earlier content or the whole new text."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a small file; a reader sees either the earlier content or the whole new one."""
    part = part_of(file)
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_plain(name: object) -> bool:
    """Returns whether `name` is a relative path without `..` and backslashes, as a list of a folder's files may contain."""
    return (
        isinstance(name, str)
        and bool(name.strip("."))
        and "\\" not in name
        and "\0" not in name
        and not PurePath(name).is_absolute()
        and ".." not in PurePath(name).parts
    )
