# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Slots are the memory on the computing device into which a layer's experts are copied.

# S slots, E experts
"""

import math
from collections.abc import Collection, Mapping

import torch


# what a slot holds beside ids of experts: nothing, or an expert that is being copied
FREE, TAKEN = -1, -2
# products take another path for matrices that do not start at a multiple of these bytes, and then round otherwise
ALIGNMENT = 64


def slot_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Returns the bytes from one slot of a tensor to the next one.

    Each matrix starts on a multiple of 64 bytes. Vectors, which are biases, lie one after the other.
    """
    size = math.prod(shape) * dtype.itemsize
    return size if len(shape) < 2 else -(-size // ALIGNMENT) * ALIGNMENT


class ExpertSlots:
    """ExpertSlots holds S experts of a layer.

    Args:
        parts: name of each parameter of the experts module -> shape of one expert's slice, and dtype.
        slots: the number S of slots.
        num_experts: the number E of the layer's experts.
        device: where the experts are computed.

    Attributes:
        tensors: name of each parameter -> memory (S, ...).
        table: (E,) int32 on the CPU, the slot of each expert, -1 where the expert is not resident.
        places: the numbers of `table` as a list, which is faster to read one by one.
        experts: the expert in each slot, or `FREE`, or `TAKEN`.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        slots: int,
        num_experts: int,
        device: torch.device,
    ):
        self.tensors = {name: _allocate(shape, dtype, slots, device) for name, (shape, dtype) in parts.items()}
        self.table = torch.full((num_experts,), -1, dtype=torch.int32)
        self.places = [-1] * num_experts
        self.experts = [FREE] * slots

    def memory(self, slot: int) -> dict[str, torch.Tensor]:
        """Returns the memory of one slot, under the names of the parameters."""
        return {name: tensor[slot] for name, tensor in self.tensors.items()}

    @property
    def resident(self) -> list[int]:
        """The ids of the resident experts."""
        return [expert for expert in self.experts if expert >= 0]

    def take(self) -> int | None:
        """Takes a free slot for an expert that is about to be copied and returns it, or None if no slot is free."""
        if FREE not in self.experts:
            return None
        slot = self.experts.index(FREE)
        self.experts[slot] = TAKEN
        return slot

    def put(self, expert: int, slot: int) -> None:
        """Notes that an expert is resident in a slot."""
        self.experts[slot] = expert
        self.table[expert] = self.places[expert] = slot

    def release(self, slot: int) -> None:
        """Makes a slot free, and the expert in it not resident."""
        if self.experts[slot] >= 0:
            self.table[self.experts[slot]] = self.places[self.experts[slot]] = -1
        self.experts[slot] = FREE

    def clear(self, filling: Collection[int]) -> None:
        """Makes all slots free but those that are being filled, whatever they hold."""
        self.table.fill_(-1)
        self.places[:] = [-1] * len(self.places)
        self.experts[:] = [TAKEN if slot in filling else FREE for slot in range(len(self.experts))]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, slots: int, device: torch.device) -> torch.Tensor:
    """Returns uninitialised memory (slots, *shape) whose slots lie [`slot_bytes`] apart."""
    distance = slot_bytes(shape, dtype) // dtype.itemsize
    if distance == math.prod(shape):
        return torch.empty(slots, *shape, dtype=dtype, device=device)
    inner = torch.empty(shape, device="meta").stride()
    return torch.empty(slots * distance, dtype=dtype, device=device).as_strided((slots, *shape), (distance, *inner))
