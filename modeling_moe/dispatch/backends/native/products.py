# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The native back end's products with experts' matrices one by one, computed by experts.c.

# T tokens, K experts per token, A = T*K assignments, E experts; N rows and M columns of an expert's matrix
"""

import ctypes
from collections.abc import Callable

import torch

from ...expert_order import ExpertOrder
from ..cpu_memory import in_huge_pages
from ..grouped_passes import Products, Side
from ..loop_products import combined
from . import structures
from .structures import Matrices


class NativeProducts(Products):
    """NativeProducts implements [`Products`] by experts.c, which gathers rows inside its products.

    Args:
        order: the expert order.
        top_k: the number K of experts per token.
        library: returns the library for a dtype.
    """

    def __init__(self, order: ExpertOrder, top_k: int, library: Callable[[torch.dtype], ctypes.CDLL]):
        self.order, self.top_k, self.library = order, top_k, library
        self.tokens = order.assignment // top_k
        self.places = torch.arange(len(order.assignment), dtype=torch.int32)

    def gathered(self, source: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._project(source, self.tokens, matrices, bias)

    def rows(self, left: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._project(left, self.places, matrices, bias)

    def _project(
        self, states: torch.Tensor, lines: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiplies line `lines[row]` of `states` by the matrix of the row's expert: (A, N)."""
        states, matrices = states.contiguous(), structures.with_lines(matrices)
        bias = None if bias is None else bias.contiguous()
        problem = self._problem(matrices.shape[2], matrices.shape[1], len(matrices))
        problem.x, problem.token, problem.up = states.data_ptr(), lines.data_ptr(), Matrices.of(matrices)
        problem.up_bias = None if bias is None else bias.data_ptr()
        product = in_huge_pages(states.new_empty(len(lines), matrices.shape[1]))
        library = self.library(states.dtype)
        scratch, words = self._scratch(library, problem)
        library.experts_project(ctypes.addressof(problem), scratch.data_ptr(), words, product.data_ptr())
        return product

    def outer(self, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor, gather: Side) -> torch.Tensor:
        total = in_huge_pages(torch.empty_like(like, dtype=left.dtype))
        left, right, target = left.contiguous(), right.contiguous(), structures.with_lines(total)
        problem = self._problem(like.shape[2], like.shape[1], len(like))
        tokens = self.tokens.data_ptr()
        outer = structures.Outer(
            *(left.data_ptr(), right.data_ptr()),
            *(tokens if gather == "left" else None, tokens if gather == "right" else None),
            *like.shape[1:],
            Matrices.of(target),
        )
        library = self.library(left.dtype)
        scratch, words = self._scratch(library, problem)
        library.experts_outer(ctypes.addressof(problem), scratch.data_ptr(), words, ctypes.addressof(outer))
        return target.to(like.dtype)

    def combine(self, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return combined(rows, self.order, self.top_k, weight)

    def _problem(self, hidden: int, columns: int, experts: int) -> structures.Problem:
        problem = structures.Problem()
        problem.offsets, problem.experts, problem.threads = (
            self.order.offsets.data_ptr(),
            experts,
            torch.get_num_threads(),
        )
        problem.hidden, problem.columns = hidden, columns
        return problem

    @staticmethod
    def _scratch(library: ctypes.CDLL, problem: structures.Problem) -> tuple[torch.Tensor, int]:
        words = library.scratch_words(ctypes.addressof(problem))
        return torch.empty(problem.threads * words, dtype=torch.float32), words
