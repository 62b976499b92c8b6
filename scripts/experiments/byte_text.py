# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module cuts the text of Python's library and documentation into bytes to train on and held-out rows.

# N bytes, R rows, S bytes of a row, B rows of a batch
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from modeling_moe.utils.errors import UserError
from modeling_moe.utils.seeds import generator_for

from .python_text import library_documents, without_seen


# one document in ten is held out to choose learning rates, and another one to test
PERIOD, RATES, TEST = 10, 0, 5


@dataclass(frozen=True)
class ByteText:
    """Holds the text; documents to choose learning rates, to test and to train on are different.

    Attributes:
        training: (N,) uint8.
        rates: rows (R, S) int64 on which learning rates are chosen.
        test: rows (R, S) int64 on which arms are compared.
    """

    training: torch.Tensor
    rates: torch.Tensor
    test: torch.Tensor


@cache
def byte_text(length: int, rate_rows: int, test_rows: int) -> ByteText:
    """Returns the text, with as many rows of `length` bytes as asked for.

    Raises:
        UserError: if the held-out documents have fewer rows.
    """
    documents = library_documents()
    parts = {part: documents[part::PERIOD] for part in (RATES, TEST)}
    training = [text for place, text in enumerate(documents) if place % PERIOD not in parts]
    rows = []
    for part, name, count in ((RATES, "rate_rows", rate_rows), (TEST, "test_rows", test_rows)):
        texts, _ = without_seen(parts[part], training)
        rows.append(_spread_rows(_bytes(texts), length, count, name))
    return ByteText(_bytes(training), *rows)


def _bytes(texts: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer("\n".join(texts).encode("utf-8"), dtype=np.uint8).copy())


def _spread_rows(text: torch.Tensor, length: int, count: int, name: str) -> torch.Tensor:
    """Returns `count` rows from evenly spread places."""
    rows = text[: len(text) // length * length].view(-1, length)
    if len(rows) < count:
        raise UserError(f"{name} is {count}, but the held-out text has {len(rows)} rows of {length} bytes: lower it")
    return rows[torch.arange(count) * len(rows) // count].long()


def batches(text: torch.Tensor, length: int, rows: int, seed: int, *path: object) -> Iterator[torch.Tensor]:
    """Yields batches (B, S) int64 from random places of `text` (N,), without end.

    Args:
        text: (N,) uint8.
        length: S.
        rows: B.
        seed, *path: seed of the places, see [`~modeling_moe.utils.seeds.generator_for`].
    """
    generator, offsets = generator_for(seed, *path), torch.arange(length)
    while True:
        starts = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
        yield text[starts + offsets].long()
