# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Which expert works on which slot.

# T tokens, K experts per token, S = T*K slots, slot t*K + k is token t's k-th choice; E experts
"""

from typing import NamedTuple

import torch


class Slots(NamedTuple):
    """The slots in the order of their experts.

    Attributes:
        order: (S,) int32, slots sorted by expert, in each expert by slot; the empty slots stand last.
        offsets: (E + 1,) int32, expert e owns `order[offsets[e]:offsets[e + 1]]`; `offsets[E]` slots are served.
    """

    order: torch.Tensor
    offsets: torch.Tensor


def group_slots(index: torch.Tensor, num_experts: int) -> Slots:
    """Sorts the slots of `index` (T, K) by expert, without a synchronisation with the host.

    An id outside [0, num_experts) is an empty slot.
    """
    ids = index.reshape(-1)
    ids = torch.where(ids < 0, num_experts, ids)
    ids, order = ids.sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype))
    return Slots(order.int(), offsets.int())


def invert(order: torch.Tensor) -> torch.Tensor:
    """(S,) int32: where in `order` (S,) each slot stands."""
    places = torch.arange(len(order), device=order.device, dtype=torch.int32)
    return torch.empty_like(order).scatter_(0, order.long(), places)
