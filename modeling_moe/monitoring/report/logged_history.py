# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads the routing figures that a training run has logged, from the trainer_state.json of transformers' Trainer."""

import math
import re
from pathlib import Path
from typing import Any

from ...utils.errors import UserError
from ...utils.json_files import read_json


STATE = "trainer_state.json"
PREFIX = "routing/"


def _state_file(source: str) -> Path:
    """Returns the state file that a path names: the file, the one in the folder, or the one of the folder's last checkpoint."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"history {source} does not exist: name a {STATE}, or the folder of a training run")
    if path.is_file():
        return path
    if (path / STATE).is_file():
        return path / STATE
    checkpoints = [folder for folder in path.iterdir() if re.fullmatch(r"checkpoint-\d+", folder.name)]
    files = [folder / STATE for folder in checkpoints if (folder / STATE).is_file()]
    if not files:
        raise UserError(
            f"history {source} holds no {STATE}, nor does a checkpoint in it: name the folder of a training run"
        )
    return max(files, key=lambda file: int(file.parent.name.removeprefix("checkpoint-")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_history(source: str) -> list[dict[str, Any]]:
    """Reads the log entries of a training run that hold routing figures.

    Args:
        source: path of a trainer_state.json, or of a folder that holds one or checkpoints with one.

    Returns:
        The entries with `step` and keys such as `routing/layer_03/max_violation`, in the order of the file; of each entry
        the values that are finite numbers.

    Raises:
        UserError: if there is no such file, it is damaged, or no entry holds a routing figure.
    """
    file = _state_file(source)
    log = read_json(file).get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise UserError(f"{file} is damaged: its log_history must be a list of objects")
    entries = []
    for entry in log:
        numbers = {key: value for key, value in entry.items() if _is_number(value)}
        if not any(key.startswith(PREFIX) for key in numbers):
            continue
        if not isinstance(numbers.get("step"), int) or numbers["step"] < 0:
            raise UserError(f"{file} is damaged: an entry of its log_history has no step")
        entries.append(numbers)
    if not entries:
        raise UserError(
            f"{file} holds no routing figures: train with modeling_moe's RoutingCallback, which moe finetune has on, and "
            "give its output here"
        )
    return entries
