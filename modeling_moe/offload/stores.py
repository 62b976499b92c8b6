# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A store holds the experts of one layer outside the computing device and copies one expert at a time into a slot.

# E experts, H hidden size, I expert width
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention_experts import attends
from ..checkpoints import open_source
from ..monitoring import experts_modules
from ..utils.errors import UserError
from .pieces import Piece, stored
from .tracing import TracedTensor, trace, traced_state


Part = tuple[tuple[int, ...], torch.dtype]

# methods that `moe convert` can dequantise
CONVERTIBLE = ("fp8", "mxfp4", "compressed-tensors", "modelopt")
DEQUANTISE = "dequantise it first: moe convert --model_name_or_path {name} --output_dir plain"
FLOATS = {"torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}


class ExpertStore(Protocol):
    """What an expert cache reads the experts of one layer from."""

    num_experts: int

    @property
    def parts(self) -> Mapping[str, Part]:
        """Name of each parameter of the experts module -> shape of one expert's slice, and dtype."""
        ...

    def read(self, expert: int, into: Mapping[str, torch.Tensor]) -> None:
        """Copies one expert's slices into the given memory.

        Args:
            expert: id of the expert, from 0 to E - 1.
            into: name of each parameter -> memory of the slice's shape; a slice is cast to the dtype of the memory.
        """
        ...


class DiskStore:
    """A store that reads experts from the safetensors files of a checkpoint, each time from the file.

    No weight stays in memory of the process: the operating system keeps in its page cache what is free.

    Args:
        pieces: name of each parameter of the experts module -> where the parameter (E, ...) lies in the files.

    Raises:
        ValueError: if a parameter is computed from the checkpoint's tensors and not only copied.
    """

    def __init__(self, pieces: Mapping[str, Piece]):
        self.pieces = dict(pieces)
        self.num_experts = next(iter(pieces.values())).shape[0]
        self.parts: dict[str, Part] = {name: (piece.shape[1:], piece.dtype) for name, piece in pieces.items()}
        memory = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in self.parts.items()}
        self.read(0, memory)

    def read(self, expert: int, into: Mapping[str, torch.Tensor]) -> None:
        """Copies one expert's slices from the files into the given memory, cast to the dtype of the memory.

        Args:
            expert: id of the expert, from 0 to E - 1.
            into: name of each parameter -> memory of the slice's shape.

        Raises:
            UserError: if the disk gives an error or a file changed since the store was made.
            ValueError: if there is no such expert, or the memory has another shape.
        """
        _check(self, expert, into)
        for name, piece in self.pieces.items():
            index = (slice(expert, expert + 1), *piece.full()[1:])
            piece.read_into(index, into[name].unsqueeze(0))


class PinnedStore:
    """A store of experts in host memory, which is page-locked where CUDA is available, so that copies can overlap.

    The store takes the parameters' own memory if they are on the CPU and there is no CUDA; otherwise each parameter is
    copied once, and the memory of the original is free as soon as nothing else holds it. Copies to a CUDA device are
    asynchronous on the current stream. The code for CUDA was never run.

    Args:
        parameters: name of each parameter of the experts module -> parameter (E, ...).
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]):
        self._tensors = {name: _in_host_memory(tensor.detach()) for name, tensor in parameters.items()}
        self.num_experts = len(next(iter(self._tensors.values())))
        self.parts: dict[str, Part] = {
            name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in self._tensors.items()
        }

    def read(self, expert: int, into: Mapping[str, torch.Tensor]) -> None:
        """Copies one expert's slices into the given memory, cast to the dtype of the memory.

        Args:
            expert: id of the expert, from 0 to E - 1.
            into: name of each parameter -> memory of the slice's shape.

        Raises:
            ValueError: if there is no such expert, or the memory has another shape.
        """
        _check(self, expert, into)
        for name, tensor in self._tensors.items():
            into[name].copy_(tensor[expert], non_blocking=True)


def _in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().pin_memory() if torch.cuda.is_available() else tensor.cpu()


def _check(store: ExpertStore, expert: int, into: Mapping[str, torch.Tensor]) -> None:
    if not 0 <= expert < store.num_experts:
        raise ValueError(f"expert {expert} does not exist: the layer has experts 0 to {store.num_experts - 1}.")
    for name, (shape, _) in store.parts.items():
        if tuple(into[name].shape) != shape:
            raise ValueError(
                f"{name} of an expert has shape {shape}, and the memory for it {tuple(into[name].shape)}."
            )


def expert_parameters(experts: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters of an experts module that hold one slice for each expert, by name.

    Args:
        experts: a module that follows transformers' experts interface, with `num_experts` experts.
    """
    own = experts.named_parameters(recurse=False)
    return {name: tensor for name, tensor in own if tensor.dim() and tensor.shape[0] == experts.num_experts}


def named_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of each layer's experts that transformers' experts interface calls.

    Experts inside attention, which stay in memory, are left out.
    """
    found = {module for module in experts_modules(model) if not attends(module)}
    for name, module in model.named_modules():
        if module in found:
            yield name, module


def refuse_quantised_experts(config: PreTrainedConfig, name: str | Path) -> None:
    """Refuses a checkpoint whose configuration says that the weights are quantised.

    Raises:
        UserError: names the method and how to make a checkpoint that is not quantised.
    """
    for described in (config, config.get_text_config()):
        settings = getattr(described, "quantization_config", None)
        if settings is None:
            continue
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings.quant_method
        method = str(getattr(method, "value", method))
        remedy = "give the checkpoint in 16 bits from which it was made"
        if method in CONVERTIBLE:
            remedy = DEQUANTISE.format(name=name)
        raise UserError(f"{name} is quantised ({method}), and its experts cannot be read one by one: {remedy}")


def disk_stores(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, name_or_path: str | Path, dtype: Any = "auto"
) -> dict[str, DiskStore]:
    """Returns the stores of all layers of a checkpoint; only the headers of the files are read.

    Args:
        model_class: class of the model.
        config: configuration of the model.
        name_or_path: folder or Hub name of the checkpoint, in safetensors.
        dtype: dtype in which `from_pretrained` would load the model, or `"auto"` for that of the configuration.

    Returns:
        Name of each experts module in the model -> store.

    Raises:
        UserError: if there is no such checkpoint, or its experts are quantised or cannot be read one by one.
        ValueError: if the checkpoint does not fit the configuration.
    """
    refuse_quantised_experts(config, name_or_path)
    traced = trace_checkpoint(model_class, config, traced_state(open_source(name_or_path).state), dtype, name_or_path)
    return stores_of(traced, name_or_path)


def trace_checkpoint(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, TracedTensor],
    dtype: Any,
    name_or_path: str | Path,
) -> PreTrainedModel:
    """Does what [`~modeling_moe.offload.tracing.trace`] does, with one sentence for a checkpoint that does not fit.

    Raises:
        ValueError: names the checkpoint.
    """
    try:
        return trace(model_class, config, state, dtype)
    except RuntimeError as error:
        # this package's own classes name the tensor
        if isinstance(error, ValueError):
            raise
        raise UserError(
            f"{name_or_path} does not fit its config.json: {str(error).splitlines()[0]}; load it with from_pretrained to see "
            "which tensors are wrong"
        ) from error


def stores_of(traced: PreTrainedModel, name_or_path: str | Path) -> dict[str, DiskStore]:
    """Returns the stores of all layers of a model that [`trace_checkpoint`] returned.

    Args:
        traced: the model.
        name_or_path: folder or Hub name of the checkpoint, for messages.

    Raises:
        UserError: if the model has no experts that can be read one by one; names the first one.
    """
    stores = {name: _store_of(name, experts, name_or_path) for name, experts in named_experts(traced)}
    if not stores:
        raise UserError(f"{name_or_path} has no experts that transformers' experts interface calls: load it whole")
    return stores


def _store_of(module: str, experts: nn.Module, name_or_path: str | Path) -> DiskStore:
    pieces: dict[str, Piece] = {}
    for name, tensor in expert_parameters(experts).items():
        if not isinstance(tensor, TracedTensor):
            raise UserError(f"{name_or_path} has no tensors for {module}.{name}: give a complete checkpoint")
        pieces[name] = tensor.piece
        if tensor.writes:
            raise UserError(
                f"{module}.{name} of {name_or_path} cannot be read expert by expert, because transformers changes it with "
                f"{tensor.writes[0]} after loading: load it whole"
            )
        if strange := {str(part.dtype) for part in stored(tensor.piece)} - FLOATS:
            raise UserError(
                f"{module}.{name} of {name_or_path} is stored as {strange.pop().removeprefix('torch.')}, so the experts are "
                f"quantised and cannot be read one by one: {DEQUANTISE.format(name=name_or_path)}"
            )
    if not pieces:
        raise UserError(f"{module} of {name_or_path} has no parameter with one slice for each expert: load it whole")
    try:
        return DiskStore(pieces)
    except ValueError as error:
        raise UserError(
            f"{module} of {name_or_path} cannot be read expert by expert ({error}): save it again with from_pretrained "
            "and save_pretrained, or load it whole"
        ) from error
