# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the sequences in packed rows, and computes sums and minima that restart with each sequence.

# B rows, S tokens per row, T = B*S tokens
"""

import torch


def find_beginnings(
    shape: tuple[int, int],
    position_ids: torch.Tensor | None,
    token_mask: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Finds the tokens that begin a sequence: the tokens whose position does not follow the position of the token before.

    Positions may count padding between tokens or not. Padding begins no sequence. The first token of a row begins a sequence
    if its position is 0; at another position it may continue a sequence in the cache.

    Args:
        shape: B and S.
        position_ids: (B, S) or (1, S) int64; None if the caller gave none.
        token_mask: (B, S), 0 at padding; None without padding.
        cu_seq_lens: (N + 1,) integers, as FlashAttention reads them: the first token of each of N sequences among the T
            tokens, and the end of the last sequence. Sequences begin there too; None if the caller gave none.

    Returns:
        (B, S) bool; None if neither argument is given, so that each row is one sequence.
    """
    begins = None
    if position_ids is not None:
        begins = _breaks(position_ids.expand(shape), token_mask)
    if cu_seq_lens is not None:
        tokens = shape[0] * shape[1]
        inner = cu_seq_lens[1:-1].long().clamp(max=tokens)
        flags = torch.zeros(tokens + 1, dtype=torch.bool, device=cu_seq_lens.device).index_fill(0, inner, True)
        flags = flags[:tokens].view(shape)
        begins = flags if begins is None else begins | flags
    return begins


def _breaks(positions: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Marks the tokens (B, S) whose position does not follow that of the token before."""
    columns = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    real = torch.ones_like(columns, dtype=torch.bool) if token_mask is None else token_mask.to(columns.device) > 0
    # column of the last real token before, or -1
    last = torch.nn.functional.pad(columns.where(real, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(1, last.clamp(min=0))
    follows = (step == 1) | (step == columns - last)
    return real & torch.where(last < 0, positions == 0, ~follows)


def first_columns(begins: torch.Tensor) -> torch.Tensor:
    """Returns the column (B, S) int64 in which each token's sequence begins in the row, from beginnings (B, S)."""
    columns = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
    return columns.where(begins, 0).cummax(dim=1).values


def running_sum(values: torch.Tensor, begins: torch.Tensor | None) -> torch.Tensor:
    """Sums `values` (B, S, ...) over each sequence up to each token, with beginnings (B, S); None if each row is one sequence."""
    total = values.cumsum(dim=1)
    if begins is None:
        return total
    first = first_columns(begins).view(*begins.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return total - (total - values).gather(1, first)


def running_min(values: torch.Tensor, begins: torch.Tensor | None) -> torch.Tensor:
    """Returns the minimum of int64 `values` (B, S, E), below 2^39 in size, over each sequence up to each token."""
    if begins is None:
        return values.cummin(dim=1).values
    # a sequence is shifted so far below the sequence before that minima do not cross
    step = begins.long().cumsum(dim=1)[..., None] << 40
    return (values - step).cummin(dim=1).values + step
