# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module restores the ids of experts where expert parallelism hides them.

Up to transformers 5.23, families whose parallel plan has an `ep_router` give each process the ids of the process's own experts,
counted from 0, and one id for all other experts. Families with `ep_dispatch_experts` give the experts the ids of all.

# T tokens, E experts, K choices per token
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class GlobalChoice(NamedTuple):
    """The choices of T tokens among the experts of all processes.

    Attributes:
        index: (T, K) int64 ids; E is an empty assignment.
        weight: (T, K) combine weights, with the gradient of the process's own experts.
        own: (T, K) bool, true where the expert lies on this process.
    """

    index: torch.Tensor
    weight: torch.Tensor
    own: torch.Tensor


def hides_ids(experts: Any, num_experts: int) -> bool:
    """Returns True if the ids that reach the experts are those of this process's part of `num_experts` experts."""
    plan = getattr(experts.config, "base_model_ep_plan", None) or {}
    return experts.num_experts < num_experts and "ep_router" in plan.values()


def restore(experts: Any, index: torch.Tensor, weight: torch.Tensor, num_experts: int) -> GlobalChoice:
    """Restores the ids and weights (T, K) of all experts from those of each process, which exchange them.

    The processes of an expert-parallel group hold one batch and call this together, as they compute the experts together.
    """
    mesh = next(value.device_mesh for value in experts.parameters(recurse=False) if isinstance(value, DTensor))
    own = index < experts.num_experts
    ids = (index.long() + mesh.get_local_rank() * experts.num_experts).where(own, -1)
    dist.all_reduce(ids, dist.ReduceOp.MAX, mesh.get_group())
    others = weight.detach().where(own, 0.0).contiguous()
    dist.all_reduce(others, group=mesh.get_group())
    return GlobalChoice(ids.where(ids >= 0, num_experts), weight.where(own, others), own)
