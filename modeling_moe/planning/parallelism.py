# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says over how many processes a model is split, and in which ways."""

import math
from dataclasses import dataclass

from ..utils.errors import UserError


@dataclass(frozen=True)
class Parallelism:
    """Sizes of the groups of processes, 1 where there is no group; the names are those of `moe finetune`.

    Attributes:
        ddp_size: copies of the (split) model, each with its own batch.
        fsdp_size: processes over which each weight is split, each with its own batch.
        tp_size: processes over which layers are split; they share a batch.
        ep_size: processes among which experts are divided: some or all of `fsdp_size` times `tp_size`, or `ep_size`
            processes with whole copies of everything else.
    """

    ddp_size: int = 1
    fsdp_size: int = 1
    tp_size: int = 1
    ep_size: int = 1

    def __post_init__(self):
        for name, size in vars(self).items():
            if size < 1:
                raise UserError(f"{name} is {size}: it must be at least 1")
        if self.fsdp_size * self.tp_size > 1 and (self.fsdp_size * self.tp_size) % self.ep_size:
            raise UserError(
                f"ep_size ({self.ep_size}) does not divide fsdp_size times tp_size ({self.fsdp_size * self.tp_size}): "
                "experts are divided among some or all of these processes"
            )
        if self.ep_size > 1 and self.ep_size % self.tp_size:
            raise UserError(
                f"ep_size ({self.ep_size}) is no multiple of tp_size ({self.tp_size}): the processes that share a batch "
                "must hold experts of one group"
            )

    @property
    def processes(self) -> int:
        """Number of all processes."""
        return self.ddp_size * self.expert_parts

    @property
    def expert_parts(self) -> int:
        """Number of processes that hold one copy of the routed experts together."""
        return max(self.fsdp_size * self.tp_size, self.ep_size)

    @property
    def keeps_experts(self) -> bool:
        """Whether neither tensor nor expert parallelism splits the experts."""
        return self.tp_size == self.ep_size == 1

    @property
    def expert_shards(self) -> int:
        """Number of processes over which FSDP splits one expert; 1 where `ep_size` leaves each expert whole."""
        return self.fsdp_size if self.ep_size == 1 else self.expert_parts // self.ep_size

    @property
    def batches(self) -> int:
        """Number of processes, or groups of them, with a batch of their own."""
        return self.processes // self.tp_size

    def check(self, num_experts: int) -> None:
        """Refuses to divide experts among more processes than there are experts, or unevenly.

        Args:
            num_experts: number of experts of a sparse feed-forward network; 0 without such networks.

        Raises:
            UserError: names `ep_size`.
        """
        if self.ep_size > 1 and (not num_experts or num_experts % self.ep_size):
            have = f"{num_experts} experts" if num_experts else "no sparse feed-forward networks"
            raise UserError(
                f"ep_size is {self.ep_size} and the model has {have}: ep_size must divide the number of experts"
            )


def rounds(size: int) -> int:
    """Returns the number of rounds of a collective among `size` processes: log2, rounded up."""
    return math.ceil(math.log2(size)) if size > 1 else 0
