# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module averages the router losses of training passes by name: those of this package's models, and those told to it."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ..router_balancing import all_ranks
from ..router_losses import RouterLosses
from .observing import ModelHook, OnFailure, in_backward


# "aux" is the loss that transformers' own MoE models return as `aux_loss`
NAMES = (*RouterLosses._fields, "aux")

_METERS: "WeakSet[RouterLossMeter]" = WeakSet()


def report_router_losses(model: nn.Module, losses: Mapping[str, torch.Tensor | None]) -> None:
    """Tells a RoutingCallback the router losses of a training pass; without one on the model the function does nothing.

    Code that adds router losses to a model which does not return them calls this in each training pass, once for the model or
    once for each sparse layer.

    Args:
        model: the model, or any module inside it.
        losses: name, a field of [`~modeling_moe.router_losses.RouterLosses`] -> scalar before the coefficient, of one layer
            or the mean over the layers; None is left out.

    Raises:
        ValueError: if a name is unknown.
    """
    for meter in list(_METERS):
        if model in meter.modules:
            meter.add(losses)


class LossMeans:
    """Averages router losses by name, without waiting for the device until `read`.

    Args:
        model: model on whose first device the sums lie.
    """

    def __init__(self, model: nn.Module):
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._device = next((weight.device for weight in model.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def add(self, losses: Mapping[str, torch.Tensor | None]) -> None:
        """Adds the losses of one pass."""
        for name, loss in losses.items():
            if name not in NAMES:
                raise ValueError(f"router loss {name!r} is unknown: choose one of {', '.join(NAMES)}")
            if isinstance(loss, torch.Tensor):
                value = loss.detach().to(self._device, torch.float32)
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Returns the mean of each loss since the last call; all processes must call it.

        Returns:
            Name, one of `NAMES` -> mean over the passes; a loss that no pass had is missing.
        """
        totals = torch.zeros(2, len(NAMES), device=self._device)
        for place, name in enumerate(NAMES):
            if name in self._sums:
                totals[0, place], totals[1, place] = self._sums[name], self._counts[name]
        sums, counts = all_ranks(totals).tolist()
        self._sums, self._counts = {}, {}
        return {name: total / count for name, total, count in zip(NAMES, sums, counts, strict=True) if count}


class RouterLossMeter(LossMeans):
    """Averages each router loss over the training passes of all processes, without waiting for the device until `read`.

    Losses are means over the routers of a kind, summed over the kinds, before their coefficients. A pass that checkpointing
    repeats is not counted again; nor is a pass in evaluation mode or without gradient.

    Args:
        model: any model of transformers, with or without an adapter.
        on_failure: function that gets an exception of a hook, after which the model runs on; by default it is raised.
    """

    def __init__(self, model: nn.Module, on_failure: OnFailure | None = None):
        super().__init__(model)
        self._on_failure = on_failure
        self.modules: WeakSet[nn.Module] = WeakSet(model.modules())
        # the router losses of a pass, by kind of routers
        self._pass: dict[str, list[Any]] | None = None
        self._handles: list = []
        decoders = [module for module in model.modules() if hasattr(module, "router_totals")]
        for decoder in decoders:
            self._watch_own(decoder)
        if not decoders:
            self._handles.append(model.register_forward_hook(self._hook(self._of_foreign)))
        _METERS.add(self)

    def _hook(self, function: Callable) -> ModelHook:
        return ModelHook(function, self._on_failure)

    def _watch_own(self, decoder: Any) -> None:
        kind_of = {module: kind for kind in decoder.slots for module in decoder.routed_modules(kind)}

        def begin(module: nn.Module, args: tuple) -> None:
            self._pass = {} if module.training and torch.is_grad_enabled() else None

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            # a layer that checkpointing repeats in backward runs outside of a pass of the decoder
            if self._pass is not None and (measured := _measured(output)):
                self._pass.setdefault(kind_of[module], []).extend(statistics[0] for statistics in measured)

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            kinds, self._pass = self._pass, None
            if kinds:
                # the decoder knows the balance loss of every scope
                means = [_mean(routers, len(routers)) for routers in kinds.values()]
                self.add(_sum(means) | {"balance": getattr(output, "aux_loss", None)})

        self._handles.append(decoder.register_forward_pre_hook(self._hook(begin)))
        self._handles.append(decoder.register_forward_hook(self._hook(end)))
        self._handles += [module.register_forward_hook(self._hook(keep)) for module in kind_of]

    def _of_foreign(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training and torch.is_grad_enabled() and not in_backward():
            self.add({"aux": getattr(output, "aux_loss", None)})

    def close(self) -> None:
        """Removes the meter from the model."""
        _METERS.discard(self)
        while self._handles:
            self._handles.pop().remove()


def _measured(output: Any) -> list[Any]:
    """Returns the statistics in a routed module's output: attention's last value is a list, a sparse block's second one is one."""
    if isinstance(output[-1], list):
        return output[-1]
    return [] if output[1] is None else [output[1]]


def _sum(means: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the sum of each loss over the kinds of routers that have it."""
    total: dict[str, torch.Tensor] = {}
    for losses in means:
        for name, loss in losses.items():
            total[name] = total[name] + loss.to(total[name].device) if name in total else loss
    return total


def _mean(layers: list[Any], number: int) -> dict[str, torch.Tensor]:
    """Returns the mean of each loss over the layers; a layer without it counts as 0."""
    sums: dict[str, torch.Tensor] = {}
    for losses in layers:
        for name, loss in zip(RouterLosses._fields, losses, strict=True):
            if loss is not None:
                value = loss.detach()
                sums[name] = sums[name] + value.to(sums[name].device) if name in sums else value
    return {name: total / number for name, total in sums.items()}
