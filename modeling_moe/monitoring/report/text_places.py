# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says of each token of all texts what is known before a model runs: its domain, its unit, its position.

# D domains, U units (stretches of text), P position bins, C candidates: tokens of the vocabulary that occur often, B blocks of S
# tokens in a batch
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .top_tokens import candidates
from .trace_sums import TokenPlaces


# the test of specialisation takes at most this many stretches of a domain's text as units
MOST_UNITS = 64


class Batch(NamedTuple):
    """A batch of blocks of one length.

    Attributes:
        places: where the tokens come from.
        texts: numbers of the traced texts in the batch -> row of the batch.
        length: S.
    """

    places: TokenPlaces
    texts: dict[int, int]
    length: int


class Texts:
    """All texts as blocks of token ids, and what of each token is known before the model runs.

    Args:
        blocks: token ids of each block of each domain.
        traced: number of blocks of each domain to trace token by token.

    Attributes:
        blocks: blocks of all domains, one after another.
        traced: numbers of the blocks that are traced token by token.
        edges: P + 1 edges of the position bins, powers of two.
        unit_domain: (U,) domain of each unit.
        tokens: (C,) candidates for the tokens that an expert takes most.
        occurrences: (C,) their numbers of occurrences.
    """

    def __init__(self, blocks: list[list[np.ndarray]], traced: int):
        self.blocks = [ids for domain in blocks for ids in domain]
        self._starts = np.cumsum([0, *map(len, self.blocks)])
        self._first = np.cumsum([0, *map(len, blocks)])
        longest = max(map(len, self.blocks))
        self.edges = [0, *(2**power for power in range(longest.bit_length()) if 2**power < longest), longest]
        spread = [np.unique(np.linspace(0, len(domain) - 1, min(traced, len(domain)), dtype=int)) for domain in blocks]
        self.traced = np.concatenate([places + first for places, first in zip(spread, self._first[:-1], strict=True)])
        self.traced = self.traced.astype(int)
        self._unit, self.unit_domain = _units(blocks)
        self.tokens, self.occurrences = candidates(self.blocks)
        self._candidate = np.full(max(int(ids.max()) for ids in self.blocks) + 1, -1)
        self._candidate[self.tokens] = np.arange(len(self.tokens))

    def batch(self, domain: int, rows: Sequence[int]) -> tuple[np.ndarray, Batch]:
        """Returns the token ids (B, S) of blocks of one domain and one length, and where the tokens come from."""
        numbers = self._first[domain] + np.asarray(rows)
        ids = np.stack([self.blocks[number] for number in numbers])
        position = np.tile(np.arange(ids.shape[1]), len(numbers))
        places = TokenPlaces(
            domain=domain,
            unit=np.repeat(self._unit[numbers], ids.shape[1]),
            bin=np.searchsorted(self.edges, position, side="right") - 1,
            candidate=self._candidate[ids.reshape(-1)],
            place=np.repeat(self._starts[numbers], ids.shape[1]) + position,
        )
        texts = {int(np.searchsorted(self.traced, n)): row for row, n in enumerate(numbers) if n in self.traced}
        return ids, Batch(places, texts, ids.shape[1])

    def domain_of(self, block: int) -> int:
        """Returns the number of the domain of a block."""
        return int(np.searchsorted(self._first, block, side="right")) - 1


def _units(blocks: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the unit of each block and the domain of each unit: consecutive blocks, of which a last short one is no unit."""
    unit, domains = [], []
    for domain, rows in enumerate(blocks):
        full = max(1, sum(len(ids) == len(rows[0]) for ids in rows))
        count = min(MOST_UNITS, full)
        unit.append(len(domains) + np.minimum(np.arange(len(rows)), full - 1) * count // full)
        domains += [domain] * count
    return np.concatenate(unit), np.array(domains)


def batches(blocks: list[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Yields the numbers of consecutive blocks of one length, at most `batch_size` at a time, so that none is padded."""
    rows: list[int] = []
    for row, ids in enumerate(blocks):
        if rows and (len(rows) == batch_size or len(ids) != len(blocks[rows[0]])):
            yield rows
            rows = []
        rows.append(row)
    yield rows
