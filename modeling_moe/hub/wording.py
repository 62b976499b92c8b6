# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module prepares recorded values for publication: paths of this machine are removed and Markdown is escaped."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


# the folders of a path that begins at a root, home folder or drive; a slash after a letter begins no path, nor do two slashes
# after a colon, as in a web address
_FOLDERS = re.compile(
    r"(?:(?<=:)(?!//)|(?<![\w:/\\.~-]))(?:file://)?(?:~\w*/|/|[A-Za-z]:[/\\]|(?:\.\./)+)(?:[^\s,;'\"|]*[/\\])?(?=[^\s/\\])"
)
_NAME = re.compile(r"[\w.-]+")
# characters that begin links, pictures, table cells and code in Markdown, or tags in HTML
_MARKS = str.maketrans(
    {"\\": "\\\\", "|": "\\|", "[": "\\[", "]": "\\]", "*": "\\*", "<": "&lt;", ">": "&gt;", "`": "'"}
)
# what begins a heading, a list, a rule or a block of code when it begins a line
_BEGINNING = re.compile(r"^(\d*)([#=+.)~:-])")


def _without_folders(text: str) -> str:
    """Reduces each path in a text to the last part; a name and `=` before a path stay."""
    name, equals, rest = text.partition("=")
    if equals and _NAME.fullmatch(name) and _is_path(rest):
        return f"{name}={_last_part(rest)}"
    return _last_part(text) if _is_path(text) else _FOLDERS.sub("", text)


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "../", "file://")) or PureWindowsPath(text).is_absolute()


def _last_part(path: str) -> str:
    return (PureWindowsPath if "\\" in path else PurePosixPath)(path).name


def without_paths(value: Any) -> Any:
    """Returns a value in JSON's types in which paths of this machine are reduced to the last part."""
    if isinstance(value, Mapping):
        return {str(without_paths(key)): without_paths(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [without_paths(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _without_folders(str(value))


def markdown_text(value: Any) -> str:
    """Returns a value as one line of Markdown text, such as a table cell; Markdown and HTML in it are escaped."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{markdown_text(key)}: {markdown_text(item)}" for key, item in value.items() if item is not None
        )
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(markdown_text(item) for item in value if item is not None)
    return " ".join(str(without_paths(value)).split()).translate(_MARKS)


def markdown_paragraph(text: str) -> str:
    """Returns a text as one line of Markdown that begins a paragraph, and nothing else."""
    return _BEGINNING.sub(r"\1\\\2", markdown_text(text))
