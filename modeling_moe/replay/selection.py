# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes a router choose given experts, and leaves to the router how it weighs them.

The weights must come from the router's full scores. A score that the router has set to zero outside the experts of its own
choice would give a recorded expert the weight zero, and no gradient.

# T tokens, E experts, Z experts without weights, K experts per token
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..router import RoutingContext
from .store import NOT_RECORDED


_TOP_K = (torch.topk, torch.Tensor.topk)
_MASKS = (torch.masked_fill, torch.Tensor.masked_fill)


class Selection:
    """The experts that a router has to choose in one pass.

    Args:
        index: (T, K) int64 expert ids; -1 where the router chooses itself. Columns after those of the router are ignored.

    Attributes:
        live: (T, K) what the router would have chosen; None until it has chosen.
    """

    def __init__(self, index: torch.Tensor):
        self.index = index
        self.live: torch.Tensor | None = None

    def choose(self, live: torch.Tensor) -> torch.Tensor:
        """Returns the experts (T, K) in place of `live`, what the router would have chosen."""
        self.live = live.detach().view(len(self.index), -1)
        width = self.live.shape[-1]
        self.refuse_wider(width)
        index = self.index[:, :width]
        return torch.where(index == NOT_RECORDED, self.live, index.to(live.dtype)).view_as(live)

    def refuse_wider(self, width: int) -> None:
        """Raises ValueError if the router chooses more experts of a token than the record has."""
        if width > self.index.shape[-1]:
            raise ValueError(
                f"the record has {self.index.shape[-1]} experts of a token where the router chooses {width}: record this model"
            )

    def begin(self) -> None:
        """Makes the router choose these experts from now on."""
        raise NotImplementedError

    def end(self) -> None:
        """Lets the router choose by itself again."""
        raise NotImplementedError


class OwnSelection(Selection):
    """The choice of a router of this package, which has a method for it.

    Args:
        index: (T, K) int64 expert ids; -1 where the router chooses itself.
        router: the router, or PEFT's layers around it, which may hold a trained copy of it.
    """

    def __init__(self, index: torch.Tensor, router: nn.Module):
        super().__init__(index)
        self._routers = [
            module for module in router.modules() if isinstance(getattr(module, "select", None), MethodType)
        ]

    def begin(self) -> None:
        """Puts a function in the place of [`~modeling_moe.router.Router.select`]."""
        for router in self._routers:
            select: Any = router.select
            vars(router)["select"] = partial(self._choose, select)

    def _choose(self, select: Callable, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return self.choose(select(scores, context))

    def end(self) -> None:
        """Removes the function."""
        for router in self._routers:
            vars(router).pop("select", None)


class TopKSelection(Selection):
    """The choice of a router of transformers: what `topk` returns for scores of all experts.

    Every router of transformers whose weights depend on its logits chooses by `torch.topk` and gathers the weights of the ids
    that it gets back.
    """

    def __init__(self, index: torch.Tensor, num_experts: int):
        super().__init__(index)
        self._mode = _TopKMode(self, num_experts)
        self._running = False

    # a compiled graph that holds `topk`, and that runs by torch's functions, would ask the mode once more
    @torch.compiler.disable
    def choose(self, live: torch.Tensor) -> torch.Tensor:
        """Returns the experts (T, K) in place of `live`, outside of compiled graphs."""
        return super().choose(live)

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
        # a router with one group of experts adds the two best scores of the group, of which the record may have one
        if func in _TOP_K and result.indices.shape[-1] <= self._selection.index.shape[-1]:
            index = self._selection.choose(result.indices)
            return torch.return_types.topk((full.gather(-1, index), index))
        return result

    def _has_all_scores(self, scores: Any) -> bool:
        columns = scores.shape[-1] if isinstance(scores, torch.Tensor) and scores.dim() else 0
        return columns >= self._num_experts and scores.numel() == len(self._selection.index) * columns
