# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module records the results of a part: one JSON object a line, written to disk before the next measurement."""

import gc
import json
import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modeling_moe.utils.errors import UserError


FILE = "results.jsonl"
# errors after which the process cannot use the GPU any more
BROKEN = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "an illegal address",
)


class DeviceLost(Exception):
    """The GPU refuses all further work of this process: the part ends, and the next part starts in a new process."""


class Results:
    """Appends the results of one part to a file.

    Args:
        path: path of the file, which all parts share.
        part: name of the part, which each line contains.
        until: seconds since the epoch after which [`Results.late`] is true; None for no limit.
    """

    def __init__(self, path: str | Path, part: str, until: float = math.inf):
        self.path, self.part, self.until = Path(path), part, until
        self.start = time.time()

    def put(self, **fields: Any) -> None:
        """Writes and prints a line of `fields`, with the part and the seconds since its start.

        NaN and infinity, which JSON does not have, are written as text.
        """
        row = {"part": self.part, "at_s": round(time.time() - self.start, 2)} | _plain(fields)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        words = (f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
        print(" ".join(words), flush=True)

    def check(self, name: str, passed: bool, **fields: Any) -> None:
        """Writes whether a check passed; if it did not, the line has an `error`.

        Args:
            name: name of the check.
            passed: whether it passed.
            fields: measured values.
        """
        self.put(check=name, passed=passed, **fields, **({} if passed else {"error": f"{name}: no"}))

    def late(self) -> bool:
        """Returns whether the time for starting something new is over."""
        return time.time() > self.until

    def seconds_left(self) -> float:
        """Seconds until [`Results.late`]; infinity without a limit."""
        return self.until - time.time()

    @contextmanager
    def attempt(self, **label: Any) -> Iterator[None]:
        """Records a failure of the body as a line of `label` and `error`, after which the part continues.

        Raises:
            DeviceLost: if the failure has left the GPU unusable for this process.
        """
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            self.put(**label, error=f"{type(error).__name__}: {' '.join(str(error).split())[:600]}")
            traceback.print_exc()
            if any(text in str(error) for text in BROKEN):
                raise DeviceLost(str(error)) from error
        else:
            return
        # frees the tensors of the exception's frames
        gc.collect()
        free()


def free() -> None:
    """Frees unused memory of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plain(value: Any) -> Any:
    """Converts a value to JSON's types."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


def read(path: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a file of results.

    Raises:
        UserError: if the file does not exist, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results {path}: the file does not exist; run `bash scripts/gpu_check.sh` first")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"results {path}: line {number} is not JSON ({error}); remove it") from error
        if not isinstance(row, dict) or "part" not in row:
            raise UserError(f"results {path}: line {number} is not a result with a part; remove it")
        rows.append(row)
    return rows
