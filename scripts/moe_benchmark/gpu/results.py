# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a part of the GPU check found: one JSON object a line, each on the disk before the next number is measured."""

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
# after these the process can do nothing more on the GPU
BROKEN = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "an illegal address",
)


class DeviceLost(Exception):
    """The GPU refuses this process any further work: the part ends, the next part starts anew."""


class Results:
    """Appends the findings of one part.

    Args:
        path: the file, which all parts share.
        part: name of the part, in each line.
        until: seconds since the epoch after which [`Results.late`] is true; never if not given.
    """

    def __init__(self, path: str | Path, part: str, until: float = math.inf):
        self.path, self.part, self.until = Path(path), part, until
        self.start = time.time()

    def put(self, **fields: Any) -> None:
        """Writes a line of `fields`, with the part and the seconds since its start, and prints it.

        Numbers that JSON does not have, NaN and infinity, are written as text.
        """
        row = {"part": self.part, "at_s": round(time.time() - self.start, 2)} | _plain(fields)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        words = (f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
        print(" ".join(words), flush=True)

    def check(self, name: str, passed: bool, **fields: Any) -> None:
        """Writes whether something that must hold does; if not, the line has an `error`.

        Args:
            name: what must hold.
            passed: whether it does.
            fields: what was seen.
        """
        self.put(check=name, passed=passed, **fields, **({} if passed else {"error": f"{name}: no"}))

    def late(self) -> bool:
        """Whether the time is over in which something new may begin."""
        return time.time() > self.until

    def seconds_left(self) -> float:
        """Seconds until [`Results.late`], infinity without a limit."""
        return self.until - time.time()

    @contextmanager
    def attempt(self, **label: Any) -> Iterator[None]:
        """Records a failure of what is within as a line of `label` and `error`, after which the part goes on.

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
        # what the frames of the exception held
        gc.collect()
        free()


def free() -> None:
    """Gives unused memory of the GPU back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plain(value: Any) -> Any:
    """The value in what JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file of results.

    Raises:
        UserError: if there is no such file, or if a line of it is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results {path}: no such file, run `bash scripts/gpu_check.sh` first")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"results {path}: line {number} is not JSON ({error}), remove it") from error
        if not isinstance(row, dict) or "part" not in row:
            raise UserError(f"results {path}: line {number} is not a result with a part, remove it")
        rows.append(row)
    return rows
