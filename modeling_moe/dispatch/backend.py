# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Backend is the interface between the operator and the code that computes the experts.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, C columns of the first projection
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from .expert_order import ExpertOrder, order_by_expert
from .problem import Combined, ExpertsProblem, Gradients, Needs
from .rounds import GatheredRounds, Rounds


if TYPE_CHECKING:
    from .backends.grouped_passes import Products


# the most tokens, and the most assignments, that `decode` is called with
DECODE_TOKENS = 16
DECODE_ASSIGNMENTS = 256


class Backend(ABC):
    """Backend computes the experts' forward, their gradients, and a fast forward for a few tokens.

    Attributes:
        name: the key in [`~modeling_moe.dispatch.backends.BACKENDS`].
        default_devices: the device types on which the back end is taken when none is asked for; None means all.
        casts_matrices: True if the back end takes fp32 matrices beside tokens in 16 bits and casts them itself.
        serves_slots: True if the back end takes `slots` of [`~modeling_moe.dispatch.problem.ExpertsProblem`]. Such a back end adds up each token's experts in
            ascending order of their ids, and overrides `rounds`.
    """

    name: ClassVar[str]
    default_devices: ClassVar[tuple[str, ...] | None] = None
    casts_matrices: ClassVar[bool] = False
    serves_slots: ClassVar[bool] = False

    def reason_unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why this machine cannot run the back end on a device in a dtype, or None if it can."""
        return None

    def reason_unsupported(self, problem: ExpertsProblem) -> str | None:
        """Returns why the back end cannot compute a problem, or None if it can."""
        return self.reason_unavailable(problem.x.device, problem.x.dtype)

    def serves(self, problem: ExpertsProblem) -> bool:
        """Returns True if the back end can compute a problem."""
        return self.reason_unsupported(problem) is None

    def decodes(self, problem: ExpertsProblem) -> bool:
        """Returns True if `decode` can compute a problem that `serves` accepts."""
        return False

    def order_by_expert(self, index: torch.Tensor, num_experts: int) -> ExpertOrder:
        """Sorts the assignments of `index` (T, K) by expert."""
        return order_by_expert(index, num_experts)

    @abstractmethod
    def forward(self, problem: ExpertsProblem, order: ExpertOrder, keep_h: bool) -> Combined:
        """Computes each token's weighted sum over its experts.

        Args:
            problem: with at least one assignment.
            order: the expert order of the assignments.
            keep_h: True to return h for backward, False to let backward compute it again.
        """

    @abstractmethod
    def backward(
        self, problem: ExpertsProblem, order: ExpertOrder, grad: torch.Tensor, h: torch.Tensor, needs: Needs
    ) -> Gradients:
        """Computes the gradients that are needed.

        Args:
            problem: the problem of the forward pass.
            order: the expert order of the forward pass.
            grad: (T, H), the gradient of the output.
            h: the h of the forward pass: (A, C), or (0, C) to compute it again.
            needs: the gradients to compute.
        """

    def decode(self, problem: ExpertsProblem, index: torch.Tensor) -> torch.Tensor:
        """Computes the output (T, H) of a few tokens without sorting them and without h.

        Args:
            problem: at most `DECODE_TOKENS` tokens and `DECODE_ASSIGNMENTS` assignments, at least one.
            index: (T, K) expert ids. An id outside [0, E) marks an empty assignment.
        """
        raise NotImplementedError(f"Back end {self.name} cannot decode: call forward.")

    def multiplies(self, states: torch.Tensor, matrices: torch.Tensor) -> bool:
        """Returns True if `products` can multiply states (., M) by experts' matrices (E, N, M) one by one."""
        return False

    def products(self, order: ExpertOrder, top_k: int) -> "Products":
        """Returns the products with experts' matrices one by one, for experts of which a layer computes half at a time.

        Args:
            order: the expert order of T * K assignments.
            top_k: the number K of experts per token.
        """
        raise NotImplementedError(f"Back end {self.name} computes whole experts alone: ask `multiplies` first.")

    def rounds(self, problem: ExpertsProblem, index: torch.Tensor, decode: bool) -> Rounds:
        """Returns what computes a pass in rounds of some experts each, in ascending order of their ids.

        Args:
            problem: holds the tokens, the combine weights and the low-rank updates; its matrices are not read.
            index: (T, K) expert ids. An id outside [0, E) marks an empty assignment.
            decode: True to compute what [`Backend.decode`] computes, False for [`Backend.forward`].
        """
        return GatheredRounds(self, problem, index)

    def add_gradients(
        self,
        problem: ExpertsProblem,
        order: ExpertOrder,
        grad: torch.Tensor,
        h: torch.Tensor,
        needs: Needs,
        grad_x: torch.Tensor | None,
    ) -> Gradients:
        """Computes the gradients of [`Backend.backward`], and adds that of `x` to `grad_x` (T, H) in `wide_dtype` in its place."""
        gradients = self.backward(problem, order, grad, h, needs)
        if grad_x is not None and gradients.x is not None:
            grad_x += gradients.x
        return gradients._replace(x=None)
