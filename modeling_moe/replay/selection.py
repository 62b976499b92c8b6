# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes a router choose given experts, and leaves to the router how it weighs them.

The weights must come from the router's full scores. A score that the router has set to zero outside the experts of its own
choice would give a recorded expert the weight zero, and no gradient.

# T tokens, E experts, Z experts without weights, K experts per token
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..router import Router, RoutingContext
from .store import NOT_RECORDED


_TOP_K = (torch.topk, torch.Tensor.topk)
_MASKS = (torch.masked_fill, torch.Tensor.masked_fill)


class Selection:
    """The experts that a router has to choose in one pass.

    Args:
        index: (T, K) int64 expert ids; -1 where the router chooses itself.

    Attributes:
        live: (T, K) what the router would have chosen; None until it has chosen.
    """

    def __init__(self, index: torch.Tensor):
        self.index = index
        self.live: torch.Tensor | None = None

    def choose(self, live: torch.Tensor) -> torch.Tensor:
        """Returns the experts (T, K) in place of `live`, what the router would have chosen."""
        self.live = live.detach().view(len(self.index), -1)
        index = self.index[:, : self.live.shape[-1]]
        return torch.where(index == NOT_RECORDED, self.live, index.to(live.dtype)).view_as(live)

    def begin(self) -> None:
        """Makes the router choose these experts from now on."""
        raise NotImplementedError

    def end(self) -> None:
        """Lets the router choose by itself again."""
        raise NotImplementedError


class OwnSelection(Selection):
    """The choice of a router of this package, which has a method for it."""

    def __init__(self, index: torch.Tensor, router: Router):
        super().__init__(index)
        self._router = router

    def begin(self) -> None:
        """Puts a function in the place of [`~modeling_moe.router.Router.select`]."""
        select: Callable[[torch.Tensor, RoutingContext], torch.Tensor] = self._router.select
        self._router.select = lambda scores, context: self.choose(select(scores, context))

    def end(self) -> None:
        """Removes the function."""
        vars(self._router).pop("select", None)


class TopKSelection(Selection):
    """The choice of a router of transformers: what `topk` returns for scores of all experts.

    Every router of transformers whose weights depend on its logits chooses by `torch.topk` and gathers the weights of the ids
    that it gets back.
    """

    def __init__(self, index: torch.Tensor, num_experts: int):
        super().__init__(index)
        self._mode = _TopKMode(self, num_experts)
        self._running = False

    def begin(self) -> None:
        """Enters a mode in which torch's `topk` returns the experts."""
        self._mode.__enter__()
        self._running = True

    def end(self) -> None:
        """Leaves the mode."""
        if self._running:
            self._running = False
            self._mode.__exit__(None, None, None)
            # mode and selection hold each other, and must not keep the scores until Python looks for cycles
            del self._mode


class _TopKMode(TorchFunctionMode):
    def __init__(self, selection: Selection, num_experts: int):
        super().__init__()
        self._selection, self._num_experts = selection, num_experts
        # scores without those of the groups that the router left out, by identity, and the full scores
        self._masked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        scores = args[0] if args else None
        if not self._has_all_scores(scores):
            return func(*args, **(kwargs or {}))
        full: Any = next((full for masked, full in self._masked if masked is scores), scores)
        result = func(*args, **(kwargs or {}))
        if func in _MASKS:
            self._masked.append((result, full))
        if func in _TOP_K:
            index = self._selection.choose(result.indices)
            return torch.return_types.topk((full.gather(-1, index), index))
        return result

    def _has_all_scores(self, scores: Any) -> bool:
        columns = scores.shape[-1] if isinstance(scores, torch.Tensor) and scores.dim() else 0
        return columns >= self._num_experts and scores.numel() == len(self._selection.index) * columns
