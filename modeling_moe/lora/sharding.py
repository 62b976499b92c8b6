# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""LoRA on a model that `DistributedConfig` has split over processes: the base is split, what is trained is whole.

Each process holds all factors and uses those of its own experts. PEFT adds them after the model was split, so neither FSDP2
nor tensor parallelism knows of them.
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


_stock_update: Any = ModulesToSaveWrapper.update
# not in PEFT before 0.21, which knows of no such splitting
_stock_tp_hooks: Any = getattr(peft_model, "add_lora_tp_hooks_dtensor", None)
_stock_tp_plan: Any = getattr(peft_model, "get_tp_plan_and_mesh", None)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Its shape when it is whole: DeepSpeed's ZeRO-3 leaves an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def splits_experts(parameter: torch.Tensor) -> bool:
    """Whether a process holds a part of each expert of (E, ...), as under tensor parallelism."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return any(placement.is_shard() and not placement.is_shard(0) for placement in placements)


def local_experts(parameter: torch.Tensor) -> tuple[int, int]:
    """The first expert of (E, ...) that this process computes, and how many: not all of them under expert parallelism.

    What FSDP2 splits it gathers before it computes: a strided placement where experts are split already.
    """
    first, count = 0, len(parameter)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), parameter.placements, strict=True):
            if type(placement) is Shard and placement.dim == 0:
                count //= size
                first += place * count
    return first, count


class _WholeFactor(torch.autograd.Function):
    """A factor that each process of a mesh has; its gradient is the mean over the mesh's batches.

    A process has the gradient of its own experts, of the tokens of all processes that send to it, so that the mean is the sum
    over the mesh by the number of its batches.
    """

    @staticmethod
    def forward(ctx, factor: torch.Tensor, mesh: DeviceMesh, batches: int) -> torch.Tensor:
        ctx.mesh, ctx.batches = mesh, batches
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = (gradient / ctx.batches).contiguous()
        for dimension in range(ctx.mesh.ndim):
            dist.all_reduce(gradient, group=ctx.mesh.get_group(dimension))
        return gradient, None, None


def of_local_experts(factors: list[torch.Tensor], parameter: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
    """Of factors (E, ...), those of the experts of `parameter` (E, ...) that this process computes.

    Args:
        factors: the same on all processes. Their gradients are too, and need no further reduction.
        parameter: the matrix that they update.
        tp_size: processes that share a batch.
    """
    first, count = local_experts(parameter)
    if not isinstance(parameter, DTensor) or count == len(parameter):
        return factors
    mesh = parameter.device_mesh
    factors = [_WholeFactor.apply(factor, mesh, mesh.size() // tp_size) for factor in factors]
    return [factor.narrow(0, first, count) for factor in factors]


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Plain parameters in place of split ones."""
    split = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    if split and any(isinstance(owner, FSDPModule) for owner in module.modules()):
        raise UserError(f"modules_to_save: FSDP2 splits {type(module).__name__} by itself, leave it away")
    for owner, name, parameter in split:
        owner._parameters[name] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
    try:
        yield
    finally:
        for owner, name, parameter in split:
            owner._parameters[name] = parameter


def _update(wrapper: ModulesToSaveWrapper, *args, **kwargs) -> None:
    """PEFT's, which copies the module to train; a split parameter is no tensor that can be copied."""
    with _gathered(wrapper.original_module):
        _stock_update(wrapper, *args, **kwargs)


def _add_tp_hooks(tp_module: nn.Linear, *args, **kwargs) -> None:
    """PEFT's, which makes a factor from this process's part of a layer; transformers asks it for the whole's widths."""
    _stock_tp_hooks(tp_module, *args, **kwargs)
    tp_module.out_features, tp_module.in_features = tp_module.weight.shape


def _tp_plan_and_mesh(model: Any, key: str) -> tuple[str | None, DeviceMesh | None]:
    """PEFT's, which goes by the plan of tensor parallelism also where that of expert parallelism replaces it."""
    plan, mesh = _stock_tp_plan(model, key)
    if plan is not None and model.config.distributed_config.ep_size > 1:
        replaced = re.sub(r"\.\d+\.", ".*.", key) in model.ep_plan
        return (None, None) if replaced else (plan, mesh)
    return plan, mesh


def install() -> None:
    """Lets PEFT work on split layers as on whole ones; a second call does nothing."""
    ModulesToSaveWrapper.update = _update
    if _stock_tp_hooks is not None and _stock_tp_plan is not None:
        peft_model.add_lora_tp_hooks_dtensor = _add_tp_hooks
        peft_model.get_tp_plan_and_mesh = _tp_plan_and_mesh


def synchronize_adapters(model: nn.Module) -> None:
    """Keeps what is trained and not split equal on all processes, for a loop of one's own: `Trainer` does so by itself.

    Call it once, on all processes, when the adapter is there and before the optimizer is made. It sends the values of the
    first process to all, and from then on each backward pass ends with the mean of the gradients over all processes.

    Args:
        model: split by `from_pretrained(..., distributed_config=...)`, with an adapter.
    """

    def average(parameter: torch.Tensor) -> None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(average)


install()
