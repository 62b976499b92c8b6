# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module freezes some experts of a layer, although one tensor holds all experts of the layer."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..attention_experts import attends
from ..monitoring import SparseLayer, UnreachableRouting, sparse_layers
from ..utils.errors import UserError


# names of router parameters with one row for each expert
_ROUTER_ROWS = ("weight", "bias", "noise_weight", "expert_scale")


class FrozenExperts:
    """Keeps experts frozen by hooks on their gradients and a copy of their weights; [`freeze_experts`] makes one."""

    def __init__(self, parameters: list[nn.Parameter], experts: list[int]):
        self._rows = [torch.tensor(experts, device=parameter.device) for parameter in parameters]
        self._parameters = parameters
        self._copies = [p.detach()[rows] for p, rows in zip(parameters, self._rows, strict=True)]
        self._hooks = [
            # a hook on the parameter itself, so that DDP, clipping and accumulation see zeros
            p.register_hook(lambda grad, rows=rows: grad.index_fill(0, rows, 0))
            for p, rows in zip(parameters, self._rows, strict=True)
            if p.requires_grad
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the experts' weights back, which weight decay, momentum or a step that mixes rows may have changed.

        Call it after each optimizer step.
        """
        for parameter, rows, copy in zip(self._parameters, self._rows, self._copies, strict=True):
            parameter.index_copy_(0, rows, copy)

    def release(self) -> None:
        """Lets the experts train again."""
        for hook in self._hooks:
            hook.remove()
        self._parameters, self._rows, self._copies, self._hooks = [], [], [], []


def freeze_experts(model: nn.Module, experts: Iterable[int], router: bool = False) -> FrozenExperts:
    """Freezes experts of the feed-forward networks of every sparse layer, bit for bit, under any optimizer.

    The gradients of the experts become 0, so gradient clipping ignores them. An optimizer may still move the weights,
    by weight decay, by momentum of an earlier phase, or by steps that mix rows (Muon). A copy of the weights on the
    same device is therefore put back after each step.

    The experts of routed attention, whose ids are of another count, train on with their routers. `requires_grad_(False)` on
    attention's `experts` freezes all of them.

    Args:
        model: any MoE model whose experts follow transformers' experts interface; DDP may wrap it. FSDP, ZeRO-3 and expert
            parallelism split the experts' parameters and are not supported. Merge LoRA adapters first.
        experts: ids of the experts, such as `range(8)` for those before [`~modeling_moe.resizing.growth.grow`].
        router: freeze the experts' rows of the networks' routers too, but not the selection bias, which the controller moves.
            The choice of a token may still change, with the other rows.

    Returns:
        An object whose `restore` must be called after each `optimizer.step()`. In a `Trainer`,
        [`FreezeExpertsCallback`] does all of this.

    Raises:
        UserError: if an id is out of range, the networks have no experts that can be reached, an adapter is around the experts,
            FSDP or ZeRO-3 has split them, or `router=True` meets a router without one row for each expert.

    Example:
        >>> frozen = freeze_experts(model, range(8))
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     frozen.restore()
        ...     optimizer.zero_grad()
    """
    experts = sorted(set(experts))
    parameters = []
    for layer in _networks(model):
        weights = _weights(layer)
        if not experts or not 0 <= experts[0] <= experts[-1] < len(weights[0]):
            raise UserError(f"experts {experts} cannot be frozen: name some of the {len(weights[0])} there")
        parameters += weights
        if router:
            parameters += _router_rows(layer.router, len(weights[0]))
    return FrozenExperts(parameters, experts)


def _networks(model: nn.Module) -> list[SparseLayer]:
    """Returns the sparse layers whose experts are feed-forward networks."""
    try:
        layers = [layer for layer in sparse_layers(model) if not attends(layer.experts)]
    except UnreachableRouting as error:
        raise UserError(f"the model has no experts to freeze: {error}") from error
    if not layers:
        raise UserError("the model has no experts to freeze: freeze_experts needs sparse feed-forward networks")
    return layers


def _weights(layer: SparseLayer) -> list[nn.Parameter]:
    """Returns the parameters (E, ...) of the experts of a layer."""
    if layer.name.endswith(".base_layer"):
        raise UserError(
            "experts inside an adapter cannot be frozen one by one: merge the adapter first, by merge_and_unload()"
        )
    weights = list(layer.experts.parameters(recurse=False))
    if not weights:
        raise UserError(f"{layer.name} has no weights to freeze one by one, as in 4 bits: load the model in 16 bits")
    if any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights):
        raise UserError("experts that FSDP or DeepSpeed has split cannot be frozen one by one: train with DDP")
    return weights


def _router_rows(gate: nn.Module | None, num_experts: int) -> list[nn.Parameter]:
    found = [] if gate is None else gate.named_parameters(recurse=False)
    rows = [parameter for name, parameter in found if name in _ROUTER_ROWS]
    outputs = getattr(gate, "num_outputs", num_experts)
    if not rows or any(len(parameter) != outputs for parameter in rows):
        raise UserError(f"{type(gate).__name__} does not have one row for each expert: set router=False")
    return rows


class FreezeExpertsCallback(TrainerCallback):
    """Freezes experts while a `Trainer` trains; the arguments and limits are those of [`freeze_experts`].

    The frozen weights are those at the beginning of training, after a checkpoint to resume from was loaded.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[FreezeExpertsCallback(range(8))])
    """

    def __init__(self, experts: Iterable[int], router: bool = False):
        self.experts, self.router = list(experts), router

    def on_train_begin(self, args, state, control, **kwargs):
        """Freezes the experts."""
        self.frozen = freeze_experts(kwargs["model"], self.experts, self.router)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Puts the experts' weights back."""
        self.frozen.restore()

    def on_train_end(self, args, state, control, **kwargs):
        """Lets the experts train again."""
        self.frozen.release()
