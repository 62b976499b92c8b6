# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The CPU's path for a few tokens without gradient, where reading the chosen experts' matrices takes the time.

# T tokens, K experts per token, R rows (the slots that are served), H hidden, I expert width, E experts
"""

from collections import Counter
from typing import Any

import torch

from .gates import GATES
from .memory import math_dtype


def decode(x, index, weight, up, down, up_bias, down_bias, gate, constants):
    """[`~modeling_moe.dispatch.loop.forward`] from `index` (T, K) rather than slots, and without h: nothing is sorted,
    and nothing but the chosen experts' weights is read.

    Returns:
        (T, H).
    """
    chosen = sorted((expert, slot) for slot, expert in enumerate(index.flatten().tolist()) if 0 <= expert < len(up))
    if not chosen:
        return torch.zeros_like(x)
    experts, slots = [expert for expert, _ in chosen], torch.tensor([slot for _, slot in chosen], device=x.device)
    counts, tokens = Counter(experts), slots // index.shape[1]

    h = _project_few(x[tokens], up, counts)
    if up_bias is not None:
        h += up_bias[experts]
    acted = x.new_empty(len(slots), down.shape[2])
    GATES[gate].forward(h, constants, acted)
    rows = _project_few(acted, down, counts)
    if down_bias is not None:
        rows += down_bias[experts]
    weighted = rows.to(weight.dtype) * weight.flatten()[slots][:, None]
    return torch.zeros_like(x, dtype=weight.dtype).index_add_(0, tokens, weighted).to(x.dtype)


def _project_few(states: torch.Tensor, matrices: torch.Tensor, counts: Counter[int]) -> torch.Tensor:
    """Rows (R, M), so many of each expert, times their experts' matrices of (E, N, M): (R, N).

    Reading the matrix takes the time. From two rows on BLAS is fastest with it on the left; where products are
    emulated, casting it pays from eight rows on.
    """
    dtype, products = math_dtype(states), []
    emulated = dtype != states.dtype
    scratch: Any = torch.empty_like(matrices[0], dtype=dtype) if emulated else None
    for (expert, count), rows in zip(counts.items(), states.split(list(counts.values())), strict=True):
        matrix = matrices[expert]
        if count == 1 or (emulated and count < 8):
            products.append(rows @ matrix.T)
        elif emulated:
            products.append((scratch.copy_(matrix) @ rows.to(dtype).T).T.to(states.dtype))
        else:
            products.append((matrix @ rows.T).T)
    return torch.cat(products)
