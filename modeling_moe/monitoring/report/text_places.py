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


# the test of specialisation takes at most this many stretches of a domain's text
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
        tested: number of units that the test of specialisation compares, the first ones of U.
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
        full = [sum(len(ids) == longest for ids in rows) for rows in blocks]
        self._unit, self.unit_domain = _units(full, [len(rows) for rows in blocks])
        self.tested = len(self.unit_domain) - len(blocks)
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


def _units(full: Sequence[int], blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each domain into units, which are stretches of equally many consecutive blocks in all domains.

    A stretch has as many blocks as cut the smallest domain into at most `MOST_UNITS`; of a larger domain, the test takes
    `MOST_UNITS` stretches from all over it.

    Args:
        full: number of blocks of full length that each domain begins with; without any in a domain, nothing is tested.
        blocks: number of all blocks of each domain.

    Returns:
        The unit of each block, and the domain (U,) of each unit; the last D units hold each domain's blocks that are not tested.
    """
    size = max(1, min(full) // MOST_UNITS)
    counts = [min(MOST_UNITS, count // size) if min(full) else 0 for count in full]
    unit, first = [], 0
    for domain, (count, units) in enumerate(zip(full, counts, strict=True)):
        own = np.full(blocks[domain], sum(counts) + domain)
        starts = np.linspace(0, count - size, units).astype(int)
        for place, start in enumerate(starts):
            own[start : start + size] = first + place
        unit.append(own)
        first += units
    domains = range(len(full))
    return np.concatenate(unit), np.concatenate([np.repeat(domains, counts), domains])


def batches(blocks: list[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Yields the numbers of consecutive blocks of one length, at most `batch_size` at a time, so that none is padded."""
    rows: list[int] = []
    for row, ids in enumerate(blocks):
        if rows and (len(rows) == batch_size or len(ids) != len(blocks[rows[0]])):
            yield rows
            rows = []
        rows.append(row)
    yield rows
