# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads and writes JSON files whose outermost value is an object."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic import write_text
from .errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file whose outermost value is an object.

    Raises:
        UserError: if the file is damaged or holds another value.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds a {type(values).__name__} where an object belongs")
    return values


def json_text(values: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """Returns an object as indented JSON text with a final line break; other scripts than Latin stay readable."""
    return json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"


def write_json(file: Path, values: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Writes an object as indented JSON, in UTF-8; the file appears whole or not at all.

    Args:
        file: path of the file; an existing file is replaced.
        values: object in JSON's types.
        sort_keys: whether keys are sorted, as transformers sorts the keys of config.json.
    """
    write_text(file, json_text(values, sort_keys=sort_keys))
