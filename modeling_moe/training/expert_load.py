# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How many tokens each expert of any MoE gets, counted where transformers calls the experts."""

from typing import Any

import torch
from torch import nn


def _assignments(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The experts' ids in a call of an experts module: (T, K), the only integers that it is given."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return next((tensor for tensor in tensors if not tensor.is_floating_point()), None)


class ExpertLoadRecorder:
    """Counts the tokens that reach each expert, in every module that follows transformers' interface for experts.

    Use it as a context manager around forward passes; an empty slot, of an id past the last expert, does not count.

    Example:
        >>> with ExpertLoadRecorder(model) as recorder:
        ...     model(input_ids=ids)
        >>> recorder.take()  # (sparse layers, E)
    """

    def __init__(self, model: nn.Module):
        # transformers sets these on each module that it can choose an experts function for
        self._experts = [
            module for module in model.modules() if all(name in vars(module) for name in ("has_gate", "is_transposed"))
        ]
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
        """The counts since the last call: (sparse layers, E) in float64 on the CPU.

        Returns:
            None if no experts were called, or the layers differ in their number of experts.
        """
        loads = [load.cpu() for load in self._loads if load is not None]
        self._loads = [None] * len(self._experts)
        return torch.stack(loads) if len({len(load) for load in loads}) == 1 else None
