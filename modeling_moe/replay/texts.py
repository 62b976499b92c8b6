# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the single texts of a batch whose rows are padded or packed.

# B rows, S tokens per row
"""

from typing import Any

import torch

from ..model_packing import find_beginnings
from ..monitoring import padding_of


def real_tokens(ids: torch.Tensor, given: dict[str, Any], cache: Any = None) -> torch.Tensor:
    """Returns (B, S) bool on the CPU, False at padding; all tokens are real where the attention mask does not tell.

    Args:
        ids: (B, S) token ids.
        given: the arguments of the model.
        cache: key-value cache of the tokens before the batch; None without one.
    """
    tokens = padding_of(given.get("attention_mask"), len(ids), ids.shape[1], cache).tokens
    return torch.ones(ids.shape, dtype=torch.bool) if tokens is None else tokens.cpu()


def texts_of(ids: torch.Tensor, given: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
    """Returns row and columns of each text of a batch without a key-value cache: real tokens, split where positions begin again.

    Args:
        ids: (B, S) token ids.
        given: the arguments of the model.
    """
    real = real_tokens(ids, given)
    positions, ends = given.get("position_ids"), given.get("cu_seq_lens_q")
    if positions is not None and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # models of images and text: the positions in the text, and three axes of a picture
    if positions is not None and positions.shape not in (ids.shape, (1, ids.shape[1])):
        positions = None
    begins = find_beginnings(
        (len(ids), ids.shape[1]),
        None if positions is None else positions.cpu(),
        real,
        None if ends is None else ends.cpu(),
    )
    texts = []
    for row, kept in enumerate(real):
        columns = kept.nonzero()[:, 0]
        parts = [columns]
        if begins is not None:
            parts = columns.tensor_split(begins[row, columns].nonzero()[:, 0])
        texts += [(row, part) for part in parts if len(part)]
    return texts
