# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the tokens that each expert takes most, with an example of each.

An expert's tokens are ranked by the share of their occurrences that the expert takes. So that a rare token does not win by
chance, a token must occur at least `MIN_OCCURRENCES` times, and the lower end of the share's 95 % interval counts (E. B.
Wilson, Probable inference, the law of succession, and statistical inference, 1927).

# C candidates: tokens of the vocabulary that occur often, E experts
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from .data import TopToken
from .token_texts import token_label, token_texts


MIN_OCCURRENCES = 8
# the most frequent tokens are the candidates, so that the counts of a large model fit into memory
MOST_CANDIDATES = 4096
# tokens and characters that an example shows before and after the token
CONTEXT_TOKENS, CONTEXT_CHARS = 8, 80


def candidates(blocks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that occur at least `MIN_OCCURRENCES` times, most frequent first, and their numbers of occurrences.

    Args:
        blocks: token ids of all texts.

    Returns:
        Two arrays (C,) int64, C at most `MOST_CANDIDATES`.
    """
    counts = np.bincount(np.concatenate(blocks))
    order = np.argsort(-counts, kind="stable")[:MOST_CANDIDATES]
    order = order[counts[order] >= MIN_OCCURRENCES]
    return order, counts[order]


def lower_bound(taken: np.ndarray, occurrences: np.ndarray, deviations: float = 1.96) -> np.ndarray:
    """Returns the lower end of Wilson's interval of the share `taken / occurrences`, for arrays that broadcast."""
    share, square = taken / occurrences, deviations**2
    centre = share + square / (2 * occurrences)
    spread = deviations * np.sqrt(share * (1 - share) / occurrences + square / (4 * occurrences**2))
    return (centre - spread) / (1 + square / occurrences)


class TopTokens:
    """Finds the tokens that each expert of any layer takes most.

    Args:
        tokenizer: tokenizer of the model.
        blocks: token ids of all texts, in the order in which places count.
        tokens: (C,) ids of the candidates.
        occurrences: (C,) number of occurrences of each.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        blocks: Sequence[np.ndarray],
        tokens: np.ndarray,
        occurrences: np.ndarray,
    ):
        self._tokenizer, self._blocks, self._tokens, self._occurrences = tokenizer, blocks, tokens, occurrences
        self._starts = np.cumsum([0, *map(len, blocks)])
        self._contexts: dict[int, tuple[str, str, str]] = {}
        self._labels: dict[int, str] = {}

    def of_experts(self, taken: np.ndarray, seen_at: np.ndarray, count: int) -> list[list[TopToken]]:
        """Returns for each of E experts at most `count` tokens, best first.

        Args:
            taken: (C, E) occurrences of each candidate that the expert takes.
            seen_at: (C, E) place of one of them.
            count: largest number of tokens of an expert.
        """
        bound = lower_bound(taken, self._occurrences[:, None])
        order = np.argsort(-bound, axis=0, kind="stable")[:count]  # (count, E)
        return [
            [
                self._token(row, taken[row, expert], seen_at[row, expert])
                for row in order[:, expert]
                if taken[row, expert]
            ]
            for expert in range(taken.shape[1])
        ]

    def _token(self, row: int, taken: int, place: int) -> TopToken:
        token = int(self._tokens[row])
        if token not in self._labels:
            self._labels[token] = token_label(self._tokenizer, token)
        share = float(taken / self._occurrences[row])
        return TopToken(self._labels[token], int(taken), share, self._context(int(place)))

    def _context(self, place: int) -> tuple[str, str, str]:
        """Returns the text before a place, at it, and after it, within the block."""
        if place not in self._contexts:
            block = int(np.searchsorted(self._starts, place, side="right")) - 1
            ids, at = self._blocks[block], place - int(self._starts[block])
            start = max(0, at - CONTEXT_TOKENS)
            texts = token_texts(self._tokenizer, ids[start : at + CONTEXT_TOKENS + 1].tolist())
            before, after = "".join(texts[: at - start]), "".join(texts[at - start + 1 :])
            self._contexts[place] = (before[-CONTEXT_CHARS:], texts[at - start], after[:CONTEXT_CHARS])
        return self._contexts[place]
