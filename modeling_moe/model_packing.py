# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Where sequences begin that lie one after another in a row, and sums that start anew with each sequence.

# B rows, S tokens of each, T = B*S tokens
"""

import torch


def find_beginnings(
    shape: tuple[int, int],
    position_ids: torch.Tensor | None,
    token_mask: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Finds the tokens that begin a sequence: those whose position does not follow that of the token before.

    Positions may count the padding in between or not; padding begins nothing. A row's first token begins a sequence
    where its position is 0; at any other one it may continue a sequence whose earlier tokens a cache holds.

    Args:
        shape: B and S.
        position_ids: int64 (B, S) or (1, S); None if nobody gave any.
        token_mask: (B, S), 0 at padding; None without padding.
        cu_seq_lens: int (N + 1,), as FlashAttention takes it: where each of N sequences begins among the T tokens, and
            where the last one ends. It adds to what the positions say; None if nobody gave any.

    Returns:
        (B, S) bool; None if neither says where sequences begin: each row is one.
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
    """Whether a token's position (B, S) follows none: (B, S) bool."""
    columns = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    real = torch.ones_like(columns, dtype=torch.bool) if token_mask is None else token_mask.to(columns.device) > 0
    # column of the last token before that is no padding, -1 without
    last = torch.nn.functional.pad(columns.where(real, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(1, last.clamp(min=0))
    follows = (step == 1) | (step == columns - last)
    return real & torch.where(last < 0, positions == 0, ~follows)


def first_columns(begins: torch.Tensor) -> torch.Tensor:
    """Column of the first token in this row of each token's sequence: (B, S) int64, of beginnings (B, S)."""
    columns = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
    return columns.where(begins, 0).cummax(dim=1).values


def running_sum(values: torch.Tensor, begins: torch.Tensor | None) -> torch.Tensor:
    """Sums of `values` (B, S, ...) over a sequence's tokens up to each one; beginnings (B, S), None for one in a row."""
    total = values.cumsum(dim=1)
    if begins is None:
        return total
    first = first_columns(begins).view(*begins.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return total - (total - values).gather(1, first)


def running_min(values: torch.Tensor, begins: torch.Tensor | None) -> torch.Tensor:
    """Least of int64 `values` (B, S, E), below 2^39 in size, among a sequence's tokens up to each one."""
    if begins is None:
        return values.cummin(dim=1).values
    # each sequence lies so far below the one before that no minimum reaches over
    step = begins.long().cumsum(dim=1)[..., None] << 40
    return (values - step).cummin(dim=1).values + step
