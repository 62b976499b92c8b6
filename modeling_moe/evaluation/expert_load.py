# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How many tokens each expert of any MoE gets, counted where transformers calls the experts."""

from typing import Any

import torch
from torch import nn


def _assignments(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The experts' ids in a call of an experts module: (T, K), the only integers that it is given."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return next((tensor for tensor in tensors if not tensor.is_floating_point()), None)


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of any MoE that hold routed experts: transformers sets these two names on each of them."""
    return [
        module for module in model.modules() if all(name in vars(module) for name in ("has_gate", "is_transposed"))
    ]


def active_share(model: Any) -> float:
    """The share of a model's parameters, embeddings aside, that one token is multiplied by.

    Args:
        model: any model of transformers, with an adapter or without.

    Returns:
        1.0 for a dense model, and where the configuration has no `num_experts_per_tok`.
    """
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        return 1.0
    idle = 0.0
    for module in experts_modules(model):
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        idle += size * max(0.0, 1 - top_k / int(getattr(module, "num_experts", top_k)))
    return 1 - idle / max(1, model.num_parameters(exclude_embeddings=True))


class ExpertLoadRecorder:
    """Counts the tokens that reach each expert, in every module that follows transformers' interface for experts.

    Use it as a context manager around forward passes; an empty slot, of an id past the last expert, does not count.

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
        """The counts since the last call: (sparse layers, E) in float64 on the CPU.

        Returns:
            None if no experts were called, or the layers differ in their number of experts.
        """
        loads = [load.cpu() for load in self._loads if load is not None]
        self._loads = [None] * len(self._experts)
        return torch.stack(loads) if len({len(load) for load in loads}) == 1 else None
