# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module sorts the assignments of tokens to experts by expert.

# T tokens, K experts per token, E experts
# A = T*K assignments: assignment t*K + k sends token t to its k-th chosen expert
"""

from typing import NamedTuple

import torch


class ExpertOrder(NamedTuple):
    """ExpertOrder lists the assignments in expert order, and so defines the rows that the experts work on.

    Attributes:
        assignment: (A,) int32, the assignment of each row. Rows are sorted by expert, then by assignment. Empty
            assignments (expert id E) come last.
        offsets: (E + 1,) int32. Expert e owns the rows from `offsets[e]` to `offsets[e + 1]`. The first `offsets[E]`
            rows belong to an expert.
    """

    assignment: torch.Tensor
    offsets: torch.Tensor


def order_by_expert(index: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sorts the assignments by expert, without a synchronisation with the host.

    Args:
        index: (T, K) integer expert ids. An id outside [0, num_experts) marks an empty assignment.
        num_experts: the number E of experts.
    """
    ids = index.reshape(-1)
    ids = torch.where(ids < 0, num_experts, ids)
    ids, assignment = ids.sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype))
    return ExpertOrder(assignment.int(), offsets.int())


def row_of_assignment(assignment: torch.Tensor) -> torch.Tensor:
    """Inverts `ExpertOrder.assignment` (A,): returns the row of each assignment, (A,) int32."""
    rows = torch.arange(len(assignment), device=assignment.device, dtype=torch.int32)
    return torch.empty_like(assignment).scatter_(0, assignment.long(), rows)


def by_assignment(rows: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Returns rows (A, N) in the order of the assignments, 0 in an empty assignment, whatever its row holds."""
    row = row_of_assignment(order.assignment)
    return torch.where((row < order.offsets[-1])[:, None], rows[row], 0)


def expert_of_row(order: ExpertOrder) -> torch.Tensor:
    """Returns the expert of each row, (A,). Rows of empty assignments get expert E - 1."""
    rows = torch.arange(len(order.assignment), device=order.assignment.device, dtype=torch.int32)
    return torch.searchsorted(order.offsets[1:-1].contiguous(), rows, right=True)
