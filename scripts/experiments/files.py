# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the results of the experiments, and refuses result files in missing folders."""

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_moe.utils import json_files
from modeling_moe.utils.errors import UserError


def refuse_missing_folders(args: object, *names: str) -> None:
    """Raises UserError if the folder of a result file does not exist, before anything is computed.

    Args:
        args: arguments of a script.
        names: names of the arguments that hold a path, or None.
    """
    for name in names:
        path = getattr(args, name)
        if path is not None and not Path(path).parent.is_dir():
            raise UserError(f"{name} {path}: make the folder {Path(path).parent} first")


def write_json(path: str, arguments: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes arguments, versions and content into a JSON file, as a whole or not at all."""
    record = {"arguments": arguments, "python": platform.python_version(), "torch": torch.__version__} | content
    json_files.write_json(Path(path), record)


def markdown_table(columns: Sequence[str], texts: int, rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in GitHub Markdown.

    Args:
        columns: names of the columns.
        texts: number of first columns that are aligned to the left; the others are aligned to the right.
        rows: cells of each row.
    """
    lines = [columns, ["---"] * texts + ["---:"] * (len(columns) - texts), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)
