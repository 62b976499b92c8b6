# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module sums named tensors over the processes of a distributed run, where a process may lack some of them."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class SharedSums(NamedTuple):
    """Sums over all processes.

    Attributes:
        tensors: name -> sum, in fp64 on the CPU.
        facts: what each process said, in the order of the processes; without the processes that count nothing.
    """

    tensors: dict[str, torch.Tensor]
    facts: list[Any]


def is_distributed() -> bool:
    """Returns True in a run of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def repeats_batch(model: nn.Module) -> bool:
    """Returns True in a process that sees the batch of another one: all but the first one of a tensor-parallel group.

    transformers' expert parallelism runs in these groups or across them.
    """
    for module in model.modules():
        mesh = getattr(module, "_device_mesh", None)
        if mesh is None:
            continue
        if mesh.mesh_dim_names is None:
            return mesh.get_local_rank() > 0
        return "tp" in mesh.mesh_dim_names and mesh.get_local_rank("tp") > 0
    return False


def _device() -> torch.device:
    """Returns the device on which the processes can sum: the CPU, or the accelerator where only accelerators talk."""
    if "gloo" in dist.get_backend() or "mpi" in dist.get_backend():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return (
        torch.device("cpu")
        if accelerator is None
        else torch.device(accelerator.type, torch.accelerator.current_device_index())
    )


def sum_over_ranks(tensors: dict[str, torch.Tensor], facts: Any, counts: bool) -> SharedSums:
    """Sums tensors over all processes; all of them must call it, with or without tensors.

    Args:
        tensors: name -> tensor; a name has one shape in all processes.
        facts: anything that can be pickled.
        counts: whether this process counts.
    """
    tensors = tensors if counts else {}
    mine = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (mine, facts, counts))
    shapes = {name: shape for other, *_ in said for name, shape in other.items()}
    device = _device()
    parts = [
        (tensors[name] if name in tensors else torch.zeros(shape)).to(device, torch.float64).flatten()
        for name, shape in sorted(shapes.items())
    ]
    facts_of_all = [fact for _, fact, counted in said if counted]
    if not parts:
        return SharedSums({}, facts_of_all)
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    split = flat.cpu().split([part.numel() for part in parts])
    total = {name: part.view(shapes[name]) for name, part in zip(sorted(shapes), split, strict=True)}
    return SharedSums(total, facts_of_all)
