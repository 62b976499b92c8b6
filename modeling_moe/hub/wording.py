# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Values of records come into what is published without paths of this machine, and into Markdown as plain text."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


# the folders of a path from a root, a home or a drive; what has a letter before the slash, or two slashes after a colon as
# in a web address, is none
_FOLDERS = re.compile(
    r"(?:(?<=:)(?!//)|(?<![\w:/\\.~-]))(?:file://)?(?:~\w*/|/|[A-Za-z]:[/\\]|(?:\.\./)+)(?:[^\s,;'\"|]*[/\\])?(?=[^\s/\\])"
)
_NAME = re.compile(r"[\w.-]+")
# of Markdown's links, pictures, cells and code, and of HTML
_MARKS = str.maketrans({"|": "\\|", "[": "\\[", "]": "\\]", "<": "&lt;", ">": "&gt;", "`": "'"})


def _without_folders(text: str) -> str:
    """A text whose paths have lost all but their last part; a name and `=` before a path stay."""
    name, equals, rest = text.partition("=")
    if equals and _NAME.fullmatch(name) and _is_path(rest):
        return f"{name}={_last_part(rest)}"
    return _last_part(text) if _is_path(text) else _FOLDERS.sub("", text)


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "../", "file://")) or PureWindowsPath(text).is_absolute()


def _last_part(path: str) -> str:
    return (PureWindowsPath if "\\" in path else PurePosixPath)(path).name


def plain(value: Any) -> Any:
    """A value in JSON's types; of a path on this machine the last part, since the rest is of no use to a reader."""
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _without_folders(str(value))


def printed(value: Any) -> str:
    """A value as a table cell, in one line; nothing in it is taken for Markdown or for HTML."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{printed(key)}: {printed(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(printed(item) for item in value if item is not None)
    return " ".join(str(plain(value)).split()).translate(_MARKS)
