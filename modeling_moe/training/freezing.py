# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Training some experts of a layer and leaving the others as they are, although one tensor holds them all."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..utils.errors import UserError


# parameters of a router that have one row for each expert
_ROUTER_ROWS = ("weight", "bias", "noise_weight")


class FrozenExperts:
    """Experts that training does not change, by hooks on their gradients and a copy of their weights; see
    [`freeze_experts`]."""

    def __init__(self, parameters: list[nn.Parameter], experts: list[int]):
        self._rows = [torch.tensor(experts, device=parameter.device) for parameter in parameters]
        self._parameters = parameters
        self._copies = [p.detach()[rows] for p, rows in zip(parameters, self._rows, strict=True)]
        self._hooks = [
            # on the leaf, so that DDP reduces, and clipping and accumulation see, zeros
            p.register_hook(lambda grad, rows=rows: grad.index_fill(0, rows, 0))
            for p, rows in zip(parameters, self._rows, strict=True)
            if p.requires_grad
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes what weight decay, momentum or a step that mixes rows did to the experts: call it after each step."""
        for parameter, rows, copy in zip(self._parameters, self._rows, self._copies, strict=True):
            parameter.index_copy_(0, rows, copy)

    def release(self) -> None:
        """Lets the experts train again."""
        for hook in self._hooks:
            hook.remove()
        self._parameters, self._rows, self._copies, self._hooks = [], [], [], []


def freeze_experts(model: nn.Module, experts: Iterable[int], router: bool = False) -> FrozenExperts:
    """Keeps experts of every sparse layer as they are, to the last bit, whatever the optimizer does.

    Their gradients become 0, so that they count for nothing in gradient clipping. An optimizer may still move them: by
    weight decay, by momentum of an earlier phase, by steps that mix rows (Muon). Therefore their weights are kept once
    more, on their device, and put back after each step.

    Args:
        model: any whose sparse blocks have `experts`, with parameters (E, ...), and `gate`; wrapped by DDP or not.
            Neither FSDP, ZeRO-3 nor expert parallelism, which split the experts' tensors. LoRA leaves all experts as
            they are but adds to each: merge it before.
        experts: ids, such as `range(8)` for those there were before [`~modeling_moe.resizing.growth.grow`].
        router: freeze their rows of the routers too; not the selection bias, which belongs to its controller. A
            token's choice still moves with the other rows.

    Returns:
        Call its `restore` after each `optimizer.step()`. In a `Trainer` [`FreezeExpertsCallback`] does all of this.

    Raises:
        UserError: if there is no such expert, FSDP or ZeRO-3 has split the experts, or `router=True` meets a router that
            has not one row for each expert.

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
    blocks: Iterable[Any] = model.modules()
    for block in blocks:
        if isinstance(getattr(block, "experts", None), nn.Module) and hasattr(block, "gate"):
            weights = list(block.experts.parameters(recurse=False))
            if any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights):
                raise UserError("experts that FSDP or DeepSpeed has split cannot be frozen one by one: train with DDP")
            if not weights or not experts or not 0 <= experts[0] <= experts[-1] < len(weights[0]):
                raise UserError(
                    f"experts {experts} cannot be frozen: name some of the {len(weights[0]) if weights else 0} there"
                )
            parameters += weights
            if router:
                parameters += _router_rows(block.gate, len(weights[0]))
    if not parameters:
        raise UserError("the model has no experts to freeze: it needs sparse layers")
    return FrozenExperts(parameters, experts)


def _router_rows(gate: nn.Module, num_experts: int) -> list[nn.Parameter]:
    rows = [parameter for name, parameter in gate.named_parameters(recurse=False) if name in _ROUTER_ROWS]
    outputs = getattr(gate, "num_outputs", num_experts)
    if not rows or any(len(parameter) != outputs for parameter in rows):
        raise UserError(f"{type(gate).__name__} has not one row for each expert: set router=False")
    return rows


class FreezeExpertsCallback(TrainerCallback):
    """Freezes experts while a `Trainer` trains; see [`freeze_experts`] for the arguments and limits.

    What is kept is what the model has when training begins, after a checkpoint to resume from is loaded.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[FreezeExpertsCallback(range(8))])
    """

    def __init__(self, experts: Iterable[int], router: bool = False):
        self.experts, self.router = list(experts), router

    def on_train_begin(self, args, state, control, **kwargs):
        """Freezes."""
        self.frozen = freeze_experts(kwargs["model"], self.experts, self.router)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Puts the experts' weights back."""
        self.frozen.restore()

    def on_train_end(self, args, state, control, **kwargs):
        """Lets them train again."""
        self.frozen.release()
