# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Low-rank updates of the experts' matrices (LoRA, arXiv:2106.09685), applied to rows and never to the matrices.

# T tokens, K experts per token, A = T*K assignments, E experts, R rank, M columns and N rows of an expert's matrix W
"""

from typing import NamedTuple, Protocol, TypeVar

import torch


class LowRank(NamedTuple):
    """LowRank replaces each expert's W by W + scaling * b a, computed as W x + scaling * b (a x).

    Attributes:
        a: (E, R, M), in any floating dtype.
        b: (E, N, R), in the dtype of `a`, with any strides.
        scaling: the factor on the update.
        dropout: the probability that an element of x is hidden from the update.
        kept: bool, False where dropout hides an element of x. It is (T, M) for the first matrix, with one row per
            token, and (A, M) for the second one, with one row per assignment. None without dropout.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0
    dropout: float = 0.0
    kept: torch.Tensor | None = None

    def drop(self, rows: int) -> "LowRank":
        """Draws `kept` for a number of rows and scales the update by 1 / (1 - dropout), as `torch.nn.Dropout` does."""
        if not self.dropout:
            return self
        kept = torch.rand(rows, self.a.shape[2], device=self.a.device) >= self.dropout
        return self._replace(scaling=self.scaling / (1 - self.dropout), kept=kept)


class Addition(NamedTuple):
    """Addition is what an update adds to a matrix product: scaling * narrow factorᵀ, and 0 where `kept` is False.

    Attributes:
        narrow: (rows, R), the product with the update's first factor.
        factor: the second factor: (N, R) of one expert, or (E, N, R) of all experts.
        scaling: the factor on the addition.
        kept: bool, the elements that dropout keeps, in the layout that the back end reads. None without dropout.
    """

    narrow: torch.Tensor
    factor: torch.Tensor
    scaling: float = 1.0
    kept: torch.Tensor | None = None


class FactorGradients(NamedTuple):
    """FactorGradients holds the gradients of an update's factors. A gradient that is not needed is None.

    Attributes:
        a: (E, R, M), in the dtype of `LowRank.a`.
        b: (E, N, R), in the dtype and the strides of `LowRank.b`.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


Rows = TypeVar("Rows", contravariant=True)


class Update(Protocol[Rows]):
    """Update is the interface by which a back end applies a [`LowRank`] to rows of its own type.

    The native back end has no implementation: its C library does these steps inside its matrix products.
    """

    def forward(self, states: Rows) -> Addition:
        """Returns the addition to the product of `states` (., M) with W."""
        ...

    def backward(self, grad: Rows) -> Addition:
        """Returns the addition to the product of the output's gradient (., N) with the transpose of W."""
        ...

    def accumulate(self, grad: Rows, states: Rows) -> None:
        """Adds the contribution of the output's gradient (., N) and the input (., M) to the factors' gradients."""
        ...

    def gradients(self) -> FactorGradients:
        """Returns the factors' gradients, scaled."""
        ...
