# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Low-rank updates of the experts' matrices (LoRA, arXiv:2106.09685), applied to states and never to the matrices.

# T tokens, K experts per token, S = T*K slots, E experts, R rank, M columns of a matrix, N rows of it
"""

from typing import Any, NamedTuple

import torch


class LowRank(NamedTuple):
    """W + scaling * b a of each expert, as W x + scaling * b (a x).

    Attributes:
        a: (E, R, M), in a dtype of its own.
        b: (E, N, R), in the dtype of `a`, of any strides.
        scaling: factor on the update.
        dropout: share of the numbers in x that the update does not see.
        kept: bool, False where x is dropped out: (T, M) of the first matrix, one row per token, (S, M) of the second.
    """

    a: Any
    b: Any
    scaling: float = 1.0
    dropout: float = 0.0
    kept: torch.Tensor | None = None

    def drop(self, rows: int) -> "LowRank":
        """With a draw of `kept` for that many rows; what is left is scaled up, as `torch.nn.Dropout` does."""
        if not self.dropout:
            return self
        kept = torch.rand(rows, self.a.shape[2], device=self.a.device) >= self.dropout
        return self._replace(scaling=self.scaling / (1 - self.dropout), kept=kept)


class LowRankPair(NamedTuple):
    """The updates of an expert's two matrices, None for one that has none."""

    up: LowRank | None
    down: LowRank | None

    @property
    def factors(self) -> list[torch.Tensor]:
        """Those that there are."""
        return [factor for update in self if update is not None for factor in (update.a, update.b)]

    def drop(self, tokens: int, slots: int) -> "LowRankPair":
        """With draws of `kept`."""
        up, down = self
        return LowRankPair(up and up.drop(tokens), down and down.drop(slots))


def pair(up_a, up_b, down_a, down_b, up_kept, down_kept, up_scaling, down_scaling) -> LowRankPair | None:
    """From the operator's arguments, None if neither matrix is updated."""
    if up_a is None and down_a is None:
        return None
    return LowRankPair(
        None if up_a is None else LowRank(up_a, up_b, up_scaling, kept=up_kept),
        None if down_a is None else LowRank(down_a, down_b, down_scaling, kept=down_kept),
    )


def arguments(low_rank: LowRankPair | None) -> tuple:
    """The operator's arguments: [`pair`] backwards."""
    if low_rank is None:
        return ()
    up, down = (update or LowRank(None, None) for update in low_rank)
    return up.a, up.b, down.a, down.b, up.kept, down.kept, up.scaling, down.scaling
