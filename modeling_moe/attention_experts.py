# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module multiplies tokens by the matrices of their experts inside attention: one product before it, one product after it.

# T tokens, K experts per token, A = T*K assignments, E experts, M columns and N rows of an expert's matrix
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from .model_experts import StackedExperts


class Projections(Protocol):
    """The products of one pass with the matrices of the experts that a routing has chosen.

    The order of the assignments by expert is computed once and serves all products. Each method gets the name of a parameter
    (E, N, M) of the experts, and the states: (T, M), one row for each token, or (T, K, M), one row for each assignment.
    """

    def each(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Returns the product of each assignment, (T, K, N) in the dtype of `states`; 0 in an empty assignment."""
        ...

    def weighted_sum(self, name: str, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns the sum over a token's assignments of `weight` (T, K) times the product: (T, N) in the dtype of `states`."""
        ...


class SortedProjections:
    """Computes the products in plain PyTorch, on rows in expert order; every other implementation is tested by it.

    Args:
        experts: module with the parameters, and `num_experts`.
        index: (T, K) ids of experts; `num_experts` and above, or a negative id, marks an empty assignment.
    """

    def __init__(self, experts: Any, index: torch.Tensor):
        self.experts, (self.tokens, self.top_k) = experts, index.shape
        number = experts.num_experts
        ids = index.reshape(-1).long()
        ids = ids.masked_fill(ids < 0, number)
        ids, self.assignment = ids.sort(stable=True)
        self.ends = torch.searchsorted(ids, torch.arange(1, number + 1, device=ids.device)).int()

    def each(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Returns (T, K, N), as [`Projections.each`] describes it."""
        rows = self._product(name, states)
        rows = torch.empty_like(rows).index_copy(0, self.assignment, rows)
        return rows.view(self.tokens, self.top_k, rows.shape[1]).to(states.dtype)

    def weighted_sum(self, name: str, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns (T, N), summed in fp32 or fp64, as [`Projections.weighted_sum`] describes it."""
        rows = self._product(name, states)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows * weight.flatten().to(rows.dtype)[self.assignment][:, None]
        total = rows.new_zeros(self.tokens, rows.shape[1])
        return total.index_add(0, self.assignment // self.top_k, rows).to(states.dtype)

    def _product(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Returns (A, N) in expert order; rows of empty assignments, which come last, are 0."""
        # read as an attribute: PEFT and quantizers compute what they put in the place of a parameter
        matrices: torch.Tensor = getattr(self.experts, name)
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrices.dtype
        place = self.assignment // self.top_k if states.dim() == 2 else self.assignment
        rows = states.reshape(-1, states.shape[-1]).to(dtype)[place]
        # transformers' grouped product serves any dtype and size, and is traced as one operator
        return torch.ops.transformers.grouped_mm_fallback(rows, matrices.to(dtype).transpose(1, 2), self.ends)


# experts implementation -> what computes the products; `modeling_moe.dispatch` adds its own
PROJECTIONS: dict[str, Callable[[Any, torch.Tensor], Projections]] = {}


def projections(experts: Any, index: torch.Tensor) -> Projections:
    """Returns the products with the experts that `index` (T, K) names, by the model's experts implementation.

    Args:
        experts: module with parameters (E, N, M), `num_experts`, and the model's `config`.
        index: (T, K) ids of experts; an id outside [0, E) marks an empty assignment.
    """
    implementation = getattr(experts.config, "_experts_implementation", None) or "eager"
    return PROJECTIONS.get(implementation, SortedProjections)(experts, index)


def attends(module: object) -> bool:
    """Returns True for experts inside attention, also those of the code that a checkpoint contains."""
    return getattr(module, "attends", False)


class AttentionExperts(StackedExperts):
    """Experts each of which has a projection to queries and a projection of what the queries have attended to.

    The parameters have the names and shapes of experts without a gate: `up_proj` (E, N, H), the query projections, and
    `down_proj` (E, H, N), the output projections. Attention stands in the place of the activation.

    Args:
        config: the model's configuration, as the router of these experts reads it.
        num_experts: number E of experts.
        width: number N of features of an expert's queries.
    """

    # `forward` takes what stands between the two projections, which no activation is
    attends = True

    def __init__(self, config: Any, num_experts: int, width: int):
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        # the attributes by which tools find experts that follow transformers' interface
        self.has_gate, self.has_bias, self.is_transposed = False, False, False
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, width))

    @property
    def matrices_per_tok(self) -> int:
        """The number of the E matrices of each parameter that a token uses."""
        return self.config.attention_experts_per_tok

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        attend: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Computes the weighted sum of the chosen experts' outputs.

        It is one call for both projections, because PEFT, FSDP and offloading wrap `forward` alone.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers, expert ids; `num_experts` and above mark an empty assignment.
            top_k_weights: (T, K) factors on the experts' outputs.
            attend: maps queries (T, K, N) to what they have attended to, (T, K, N).

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        products = projections(self, top_k_index)
        attended = attend(products.each("up_proj", hidden_states))
        return products.weighted_sum("down_proj", attended, top_k_weights)
