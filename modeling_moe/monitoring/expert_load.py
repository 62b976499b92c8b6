# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts the tokens that each expert of any MoE receives, where transformers calls the experts."""

from typing import Any

import torch
from torch import nn

from .layers import experts_modules


def _assignments(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Returns the expert ids (T, K) among the arguments of an experts module: the only integer tensor there."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return next((tensor for tensor in tensors if not tensor.is_floating_point()), None)


class ExpertLoadRecorder:
    """Counts the tokens that reach each expert, in every module that follows transformers' experts interface.

    Use it as a context manager around forward passes. Empty assignments (expert id E) are not counted.

    Example:
        >>> with ExpertLoadRecorder(model) as recorder:
        ...     model(input_ids=ids)
        >>> recorder.take()  # (sparse layers, E)
    """

    def __init__(self, model: nn.Module):
        self._experts = experts_modules(model)
        self._loads: list[torch.Tensor | None] = [None] * len(self._experts)
        self._handles: list = []

    def __enter__(self) -> "ExpertLoadRecorder":
        for layer, module in enumerate(self._experts):
            self._handles.append(module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, layer: int):
        def count(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            index = _assignments(args, kwargs)
            if index is None:
                return
            experts = int(module.num_experts)
            load = torch.bincount(index.flatten().long().clamp(0, experts), minlength=experts + 1)[:experts]
            known = self._loads[layer]
            self._loads[layer] = load.double() if known is None else known + load

        return count

    def take(self) -> torch.Tensor | None:
        """Returns the counts since the last call, and starts from 0 again.

        Returns:
            (sparse layers, E) in float64 on the CPU; None if no experts were called, or if layers differ in E.
        """
        loads = [load.cpu() for load in self._loads if load is not None]
        self._loads = [None] * len(self._experts)
        return torch.stack(loads) if len({len(load) for load in loads}) == 1 else None
