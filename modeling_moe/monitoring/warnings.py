# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says once, in plain words, what is wrong with the routing of a model in training, and what to do about it.

A reading is what has been measured since the reading before it, over all processes.

# E experts, Z experts without weights, K assignments per token
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .layers import SparseLayer


# a router collapses where its marginal entropy is below this share of log(E + Z) and has fallen by `FALL` of log(E + Z)
COLLAPSED = 0.75
FALL = 0.05
# readings in a row in which an expert gets no token, or a router no gradient, or a selection bias stays where it was; equal
# experts give a router no gradient until the learning rate of the warm-up, which may begin at 0, has made them different
READINGS = 3
# smallest number of assignments per expert in a reading of which an expert without tokens means something
LEAST_LOAD = 32
DROPPED = 0.1
# a router's gradient below this share of the model's is a rounding error of 0
ROUNDING = 1e-8
BALANCE = (
    "raise the coefficient of the load-balancing loss (router_aux_loss_coef), or balance by a selection bias "
    "(router_controller)"
)


class Reading(NamedTuple):
    """What the warnings judge.

    Attributes:
        layers: figures of the sparse layers, [`~modeling_moe.monitoring.LayerFigures`].
        router_gradients: qualified name of a layer's experts -> norm of the gradient of the layer's trained router.
        model_gradient: norm of the gradient of the whole model; 0 if unknown, infinite if the optimizer's step may have been
            skipped because the gradient was not finite.
    """

    layers: Sequence[Any]
    router_gradients: dict[str, float]
    model_gradient: float = 0.0


def listed(values: Iterable[int | str], singular: str, most: int = 8) -> str:
    """Returns "layer 3" or "layers 1, 2, 3", cut after `most` values."""
    values = list(values)
    text = ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
    return f"{singular}{'s' if len(values) > 1 else ''} {text}"


class Collapse:
    """Says that routers collapse: they send ever more tokens to ever fewer experts.

    Args:
        frozen: qualified names of the experts whose router is not trained, so that nothing can be done about it.
    """

    def __init__(self, frozen: frozenset[str]):
        self._frozen = frozen
        self._highest: dict[str, float] = {}

    def __call__(self, reading: Reading) -> str | None:
        """Returns the warning, or None."""
        fallen = {}
        for layer in reading.layers:
            entropy = layer.marginal_entropy
            if entropy is None or layer.name in self._frozen or not layer.tokens or not math.isfinite(entropy):
                continue
            share = entropy / math.log(max(2, layer.num_experts))
            highest = self._highest[layer.name] = max(share, self._highest.get(layer.name, share))
            if share < COLLAPSED and share < highest - FALL:
                fallen[layer.layer] = share
        if not fallen:
            return None
        lowest = min(fallen.values())
        return (
            f"The routing collapses in {listed(fallen, 'layer')}: the routers prefer ever fewer experts (their marginal "
            f"entropy has fallen to {lowest:.0%} of that in balance). Lower the learning rate of the routers, or {BALANCE}."
        )


class DeadExperts:
    """Says that experts got no token in several readings in a row.

    Args:
        frozen: qualified names of the experts whose router is not trained, so that nothing can be done about it.
    """

    def __init__(self, frozen: frozenset[str]):
        self._frozen = frozen
        self._idle: dict[str, torch.Tensor] = {}

    def __call__(self, reading: Reading) -> str | None:
        """Returns the warning, or None."""
        dead = {}
        for layer in reading.layers:
            if layer.name in self._frozen or layer.load.sum() < LEAST_LOAD * layer.num_experts:
                continue
            idle = self._idle.get(layer.name, torch.zeros_like(layer.load))
            idle = self._idle[layer.name] = (idle + 1) * (layer.load == 0)
            if (idle >= READINGS).any():
                dead[layer.layer] = (idle >= READINGS).nonzero().flatten().tolist()
        if not dead:
            return None
        number, total = sum(map(len, dead.values())), sum(layer.num_experts for layer in reading.layers)
        first, experts = next(iter(dead.items()))
        return (
            f"{number} of {total} experts got no token in {READINGS} logs in a row, in {listed(dead, 'layer')} (in layer "
            f"{first}: {listed(experts, 'expert')}), and do not train. To use them, {BALANCE}; `moe resize` removes them."
        )


class Drops:
    """Says that the capacity of experts drops many assignments, unless a model of this package has said it.

    Args:
        model: any model of transformers.
    """

    def __init__(self, model: nn.Module):
        decoders: list[Any] = [module for module in model.modules() if hasattr(module, "router_totals")]
        self._said: list[set[str]] = [decoder.router_totals.warned for decoder in decoders]

    def __call__(self, reading: Reading) -> str | None:
        """Returns the warning, or None."""
        shares = {x.layer: x.dropped_share for x in reading.layers if x.tokens and (x.dropped_share or 0) > DROPPED}
        if not shares or any("dropped" in said for said in self._said):
            return None
        for said in self._said:
            said.add("dropped")
        return (
            f"{max(shares.values()):.0%} of the assignments are dropped in {listed(shares, 'layer')}: these experts are full, "
            f"and the tokens pass without them. Raise capacity_factor, or {BALANCE}."
        )


class IdleRouters:
    """Says that routers to be trained get no gradient while the model learns."""

    def __init__(self) -> None:
        self._idle: dict[str, int] = {}

    def __call__(self, reading: Reading) -> str | None:
        """Returns the warning, or None."""
        least = ROUNDING * reading.model_gradient
        if least == 0 or not math.isfinite(least):
            return None
        for name, norm in reading.router_gradients.items():
            self._idle[name] = self._idle.get(name, 0) + 1 if norm < least else 0
        idle = [layer.layer for layer in reading.layers if self._idle.get(layer.name, 0) >= READINGS]
        if not idle:
            return None
        return (
            f"The router of {listed(idle, 'layer')} gets no gradient, and does not learn. One expert per token with "
            "norm_topk_prob=True has a constant weight (set norm_topk_prob=False), a weight under torch.no_grad has no gradient, "
            "and reentrant checkpointing drops transformers' aux_loss (use_reentrant=False). To freeze the routers on purpose, "
            "set requires_grad=False."
        )


def selection_biases(model: nn.Module, layers: Sequence[SparseLayer]) -> dict[int, torch.Tensor]:
    """Returns the selection biases of trained routers: tensors of E + Z numbers that choose experts and get no gradient.

    A selection bias is a buffer or a parameter without gradient, called bias, in a sparse block but not in the experts. A
    layer whose router has no trained weight has none here: to leave the bias of a frozen router as it is, is right.

    Args:
        model: any model of transformers.
        layers: its sparse layers.

    Returns:
        Index of a decoder layer -> selection bias, the model's own tensor.
    """
    found = {}
    for layer in layers:
        if layer.router is None or not any(weight.requires_grad for weight in layer.router.parameters()):
            continue
        block = model.get_submodule(layer.name.rpartition(".")[0])
        inside = {id(tensor) for tensor in (*layer.experts.parameters(), *layer.experts.buffers())}
        for name, tensor in (*block.named_buffers(), *block.named_parameters()):
            named = "bias" in name.rpartition(".")[2] and "original_module" not in name
            # (E + Z,), or (1, E + Z)
            is_vector = tensor.numel() >= layer.num_experts and tensor.shape[-1] == tensor.numel()
            if named and is_vector and not tensor.requires_grad and id(tensor) not in inside:
                found[layer.layer] = tensor
    return found


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy on the CPU of the part of a tensor that this process holds."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().cpu().clone()


class IdleBiases:
    """Says that selection biases, which are to balance the experts, stay where they are.

    Args:
        model: any model of transformers, when its training begins.
        layers: its sparse layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[SparseLayer]):
        self._model, self._layers = model, layers
        self._first = {layer: _values(bias) for layer, bias in selection_biases(model, layers).items()}
        self._readings = 0

    def __call__(self, reading: Reading) -> str | None:
        """Returns the warning, or None."""
        if not self._first or not math.isfinite(reading.model_gradient):
            return None
        self._readings += 1
        # found anew: what moves a bias may put another tensor in its place
        now = selection_biases(self._model, self._layers)
        if any(layer in now and not torch.equal(_values(now[layer]), first) for layer, first in self._first.items()):
            self._first = {}
            return None
        if self._readings < READINGS:
            return None
        return (
            f"The selection bias of {listed(self._first, 'layer')} never moves, and so does not balance the experts: "
            "transformers loads such a bias and does not update it. Give the Trainer a modeling_moe.training.MoECallback, and "
            "set a step size, such as DeepSeek-V3's 0.001: for a model of transformers by modeling_moe.training.balance(model, "
            "router_bias_update_rate=0.001), for a model of this package by config.router_bias_update_rate."
        )


def _frozen(layers: Sequence[SparseLayer]) -> frozenset[str]:
    """Returns the qualified names of the experts whose router has weights of which none is trained."""
    weights = {layer.name: list(layer.router.parameters()) for layer in layers if layer.router is not None}
    return frozenset(
        name for name, found in weights.items() if found and not any(weight.requires_grad for weight in found)
    )


@dataclass
class RoutingWarnings:
    """The warnings of one training run; each is given once.

    Attributes:
        checks: functions that return a warning, or None while there is nothing to warn of.
    """

    checks: list[Callable[[Reading], str | None]]

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[SparseLayer]) -> "RoutingWarnings":
        """Returns the warnings for a model whose training begins."""
        frozen = _frozen(layers)
        return cls([Collapse(frozen), DeadExperts(frozen), Drops(model), IdleRouters(), IdleBiases(model, layers)])

    def judge(self, reading: Reading) -> list[str]:
        """Returns the new warnings after a reading."""
        found = [(check, check(reading)) for check in self.checks]
        self.checks = [check for check, message in found if message is None]
        return [message for _, message in found if message is not None]
