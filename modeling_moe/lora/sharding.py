# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module trains LoRA on a model that `DistributedConfig` has split over processes.

The base model is split; the trained factors are not. Each process holds the factors of all experts and uses those of
the experts that it computes. PEFT adds the factors after the model was split, so neither FSDP2 nor tensor parallelism
manages them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import model as peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..utils.errors import UserError


_stock_update = ModulesToSaveWrapper.update
_stock_tp_hooks = getattr(peft_model, "add_lora_tp_hooks_dtensor", None)
_stock_tp_plan = getattr(peft_model, "get_tp_plan_and_mesh", None)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Returns the shape of the whole parameter, of which DeepSpeed's ZeRO-3 leaves an empty tensor.

    A linear layer of bitsandbytes in 4 bits holds a vector of bytes, and the shape beside them.
    """
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape


def splits_experts(parameter: torch.Tensor) -> bool:
    """Returns whether each process holds a part of every expert of `parameter` (E, ...), as under tensor parallelism."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return any(placement.is_shard() and not placement.is_shard(0) for placement in placements)


def local_experts(parameter: torch.Tensor) -> tuple[int, int]:
    """Returns the first expert of `parameter` (E, ...) that this process computes, and the number of experts.

    Only expert parallelism leaves a process fewer than E. FSDP2 gathers what it has split before the computation;
    where experts are split already, its placement is a strided one, which is not a plain `Shard`.
    """
    first, count = 0, len(parameter)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError("this process is not in the device mesh that the experts are split over")
        for size, place, placement in zip(mesh.shape, coordinate, parameter.placements, strict=True):
            if type(placement) is Shard and placement.dim == 0:
                count //= size
                first += place * count
    return first, count


class _WholeFactor(torch.autograd.Function):
    """The identity on a factor that all processes of a mesh hold; backward averages the gradient over the batches.

    A process computes the gradient of its own experts from the tokens that all processes send to it. The mean is
    therefore the sum over the mesh, divided by the number of batches.
    """

    @staticmethod
    def forward(ctx, factor: torch.Tensor, mesh: DeviceMesh, batches: int) -> torch.Tensor:
        ctx.mesh, ctx.batches = mesh, batches
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = (grad_outputs[0] / ctx.batches).contiguous()
        for dimension in range(ctx.mesh.ndim):
            dist.all_reduce(gradient, group=ctx.mesh.get_group(dimension))
        return gradient, None, None


def of_local_experts(factors: list[torch.Tensor], parameter: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
    """Returns the factors of the experts that this process computes: the rows of each factor (E, ...) of those
    experts.

    Args:
        factors: equal on all processes. Backward makes their gradients equal on all processes too.
        parameter: the matrix (E, ...) that the factors update.
        tp_size: number of processes that share a batch.
    """
    first, count = local_experts(parameter)
    if not isinstance(parameter, DTensor) or count == len(parameter):
        return factors
    mesh = parameter.device_mesh
    factors = [_WholeFactor.apply(factor, mesh, mesh.size() // tp_size) for factor in factors]
    return [factor.narrow(0, first, count) for factor in factors]


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Puts whole parameters in the place of the split ones of `module` inside the block.

    Raises:
        UserError: if FSDP2 has split the module by itself.
    """
    split = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    if split and any(isinstance(owner, FSDPModule) for owner in module.modules()):
        raise UserError(f"modules_to_save: FSDP2 splits {type(module).__name__} by itself, omit it there")
    for owner, name, parameter in split:
        owner._parameters[name] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
    try:
        yield
    finally:
        for owner, name, parameter in split:
            owner._parameters[name] = parameter


def update(wrapper: ModulesToSaveWrapper, *args: Any, **kwargs: Any) -> None:
    """Copies the module to train as PEFT's `update` does, from whole parameters: PEFT cannot copy split ones."""
    with _gathered(wrapper.original_module):
        _stock_update(wrapper, *args, **kwargs)


def add_tp_hooks(tp_module: nn.Linear, *args: Any, **kwargs: Any) -> None:
    """Adds PEFT's hooks for tensor parallelism, and gives the factor the widths of the whole layer.

    PEFT makes the factor from this process's part of the layer, and transformers asks the factor for its widths.
    """
    assert _stock_tp_hooks is not None  # `enable` replaces only what PEFT has
    _stock_tp_hooks(tp_module, *args, **kwargs)
    tp_module.out_features, tp_module.in_features = tp_module.weight.shape


def tp_plan_and_mesh(model: Any, current_key: str) -> tuple[str, DeviceMesh] | tuple[None, None]:
    """Returns PEFT's plan and mesh of a layer, or None for a layer where expert parallelism replaces the plan."""
    assert _stock_tp_plan is not None  # `enable` replaces only what PEFT has
    plan, mesh = _stock_tp_plan(model, current_key)
    if plan is not None and model.config.distributed_config.ep_size > 1:
        replaced = re.sub(r"\.\d+\.", ".*.", current_key) in model.ep_plan
        return (None, None) if replaced else (plan, mesh)
    return plan, mesh


def synchronize_adapters(model: nn.Module) -> None:
    """Keeps trained weights that are not split equal on all processes, for training loops without `Trainer`.

    Call it once on all processes, after the adapter was added and before the optimizer is made. It sends the values of
    the first process to all others. From then on each backward pass ends with the mean of the gradients over all
    processes. `Trainer` does this by itself.

    Args:
        model: a model that `from_pretrained(..., distributed_config=...)` has split, with an adapter.
    """

    def average(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())

    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(average)
