# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module loads a model whose experts stay in the checkpoint, or in host memory, and never holds them all elsewhere."""

import copy
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoints import Source, open_source
from ..utils.errors import UserError
from ..utils.loading import saved_in_4bit
from ..utils.locations import local_folder
from .four_bits import joined, without_quantization
from .offloading import offload_to_stores, refuse_unfit
from .pieces import Stored, stored
from .stores import (
    DiskStore,
    ExpertStore,
    PinnedStore,
    expert_parameters,
    named_experts,
    refuse_quantised_experts,
    stores_of,
    trace_checkpoint,
)
from .tracing import TracedTensor, traced_state


# argument of from_pretrained -> what takes its place here
REMEDIES = {
    "device_map": "give device",
    "torch_dtype": "give dtype",
    "experts_implementation": "the experts are computed from the cache",
    "quantization_config": "experts are read as the checkpoint holds them, in 16 or 32 bits",
    "load_in_4bit": "experts are read as the checkpoint holds them, in 16 or 32 bits",
    "load_in_8bit": "experts are read as the checkpoint holds them, in 16 or 32 bits",
    "state_dict": "give the folder of a checkpoint",
}

# bytes
ALIGNMENT = 64


class WithoutExperts(NamedTuple):
    """A model whose experts are not in it.

    Attributes:
        model: the model in evaluation mode; the parameters of its experts are on the meta device.
        stores: name of each experts module -> store of the layer's experts.
    """

    model: PreTrainedModel
    stores: Mapping[str, ExpertStore]


Check = Callable[[PreTrainedModel, Mapping[str, ExpertStore]], None]


class _Unread:
    """A tensor of a file that transformers' loader reads when it asks for it; one is read at a time.

    The loader takes `tensor[...]` and calls `to` on the result, in several threads at once.
    """

    def __init__(self, piece: Stored, lock: threading.Lock):
        self.shape, self.dtype = torch.Size(piece.shape), piece.dtype
        self._piece, self._lock = piece, lock

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> "_Unread":
        if index is not Ellipsis:
            raise TypeError("transformers' loader asks for a part of a tensor, which no supported release does")
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        with self._lock:
            tensor = _memory_as_mapped(self._piece)
            self._piece.read_into(self._piece.full(), tensor)
            return tensor.to(device=device, dtype=dtype)


def _memory_as_mapped(piece: Stored) -> torch.Tensor:
    """Returns uninitialised memory for a tensor, at an address that is aligned as in a mapped file.

    `from_pretrained` maps files on CPUs, and products round otherwise where a matrix starts at another multiple of 64 bytes.
    """
    size = math.prod(piece.shape) * piece.dtype.itemsize
    if piece.offset % piece.dtype.itemsize or not size:
        return torch.empty(piece.shape, dtype=piece.dtype, device="cpu")
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    first = (piece.offset - memory.data_ptr()) % ALIGNMENT
    return memory[first : first + size].view(piece.dtype).view(piece.shape)


def from_pretrained_offloaded(
    name_or_path: str | Path,
    budget: int | str | None = None,
    slots: int | None = None,
    tier: str = "disk",
    policy: str = "lfru",
    prefetch: int | None = None,
    dtype: Any = "auto",
    device: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model that computes its experts from a cache, without ever holding all experts in memory.

    The model gives the outputs that [`~modeling_moe.offload.offload_experts`] gives on the model of `from_pretrained`. With
    `tier="disk"`, memory holds the slots, all other weights, and one further tensor while loading. A `custom_generate` folder
    is not read.

    Args:
        name_or_path: folder or Hub name of a checkpoint in safetensors, of this package or of any family of transformers
            whose experts are called by transformers' experts interface.
        budget: bytes of all slots of all layers, or text such as `"4GiB"`. Give this or `slots`.
        slots: the number of experts of each layer that are held.
        tier: `"disk"` reads experts from the checkpoint's files, which must stay as they are; `"pinned"` holds them all in
            host memory.
        policy: a key of [`~modeling_moe.offload.policies.POLICIES`], which chooses the expert that gives up its slot.
        prefetch: loads experts ahead of each layer, with this many beyond those that the next router chooses, as
            [`~modeling_moe.offload.prefetch.prefetch_experts`] does; None loads none ahead.
        dtype: dtype of the weights, or `"auto"` for that of the configuration.
        device: where the model computes; the CPU if not given.
        **options: `config`, `model_class`, `attn_implementation`, `trust_remote_code`, `revision`, `token`, `cache_dir` and
            `local_files_only`, as [`load_without_experts`] takes them.

    Returns:
        The model in evaluation mode. [`~modeling_moe.offload.offload_statistics`] gives what its caches count.

    Raises:
        TypeError: for another option.
        UserError: if there is no such checkpoint, or its experts are quantised or cannot be read one by one.
        ValueError: if the budget is below the experts of one token, or the checkpoint does not fit its configuration.

    Example:
        >>> import torch
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> from modeling_moe.offload import from_pretrained_offloaded
        >>> config = MoEConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=8)
        >>> MoEForCausalLM(config).save_pretrained("outputs/moe")
        >>> model = from_pretrained_offloaded("outputs/moe", slots=4)
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """
    if refused := sorted(REMEDIES.keys() & options.keys()):
        raise TypeError(f"from_pretrained_offloaded takes no {refused[0]}: {REMEDIES[refused[0]]}")

    def check(model: PreTrainedModel, stores: Mapping[str, ExpertStore]) -> None:
        refuse_unfit(model, stores, budget, slots, policy, prefetch)

    model, stores = load_without_experts(name_or_path, tier, dtype, device, check=check, **options)
    offload_to_stores(model, stores, budget, slots, policy, device=device, prefetch=prefetch)
    return model


def load_without_experts(
    name_or_path: str | Path,
    tier: str = "disk",
    dtype: Any = "auto",
    device: Any = None,
    *,
    check: Check | None = None,
    config: PreTrainedConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> WithoutExperts:
    """Loads everything of a checkpoint but the experts, and opens a store for the experts of each layer.

    Args:
        name_or_path, tier, dtype, device: as for [`from_pretrained_offloaded`].
        check: called with the stores and the model on the meta device, before any weight is read; with `tier="pinned"` it is
            called with the model in memory.
        config: configuration of the model; the checkpoint's if not given.
        model_class: class of the model; the one that `AutoModelForCausalLM` takes if not given.
        attn_implementation, trust_remote_code: as for `from_pretrained`.
        revision, token, cache_dir, local_files_only: how a model is downloaded from the Hub, as for `from_pretrained`.

    Raises:
        UserError: if there is no such checkpoint, or its experts are quantised or cannot be read one by one.
        ValueError: if the tier is unknown or the checkpoint does not fit its configuration.
    """
    if tier not in LOADERS:
        raise ValueError(f"tier={tier!r} is unknown: use 'disk' or 'pinned'")
    name = local_folder(name_or_path)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if config is None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
    config = copy.deepcopy(config)
    config._experts_implementation = "moe"
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    in_4bit = tier == "disk" and saved_in_4bit(config)
    if in_4bit:
        without_quantization(config, name)
    refuse_quantised_experts(config, name)
    source = open_source(name, hub=hub)
    request = _Request(model_class or _causal_class(config, trust_remote_code), config, dtype, device, check, in_4bit)
    loaded = LOADERS[tier](request, source)
    loaded.model.config.name_or_path = loaded.model.name_or_path = name
    return loaded


class _Request(NamedTuple):
    """What is to be loaded, and where to."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: Any
    device: Any
    check: Check | None
    in_4bit: bool


def _on_disk(request: _Request, source: Source) -> WithoutExperts:
    state = traced_state(source.state)
    if request.in_4bit:
        dtypes = (each for each in (request.dtype, request.config.dtype) if isinstance(each, torch.dtype))
        state = joined(state, next(dtypes, None), source.folder)
    traced = trace_checkpoint(request.model_class, request.config, state, request.dtype, source.folder)
    stores = stores_of(traced, source.folder)
    if request.check is not None:
        _empty_experts(traced, stores)
        request.check(traced, stores)
    model = _load_rest(request, state, stores)
    _empty_experts(model, stores)
    _refuse_unread(model, source.folder)
    _load_generation_config(model, source.folder)
    return WithoutExperts(model, stores)


def _refuse_unread(model: PreTrainedModel, folder: Path) -> None:
    """Refuses a model that has another weight in a tensor of experts, which was therefore not read."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, TracedTensor):
            raise UserError(f"{name} of {folder} lies in one tensor with experts, which is not served: load it whole")


def _in_memory(request: _Request, source: Source) -> WithoutExperts:
    # not from the folder itself: the experts would then be mapped, and a change of the files would change them
    model = _load_rest(request._replace(device=None), traced_state(source.state), {})
    _load_generation_config(model, source.folder)
    stores: dict[str, ExpertStore] = {}
    for name, experts in list(named_experts(model)):
        stores[name] = PinnedStore(expert_parameters(experts))
        # the memory of a layer that was copied to page-locked memory is free before the next one is copied
        _empty_experts(model, {name: stores[name]})
    if not stores:
        raise UserError(f"{source.folder} has no experts that transformers' experts interface calls: load it whole")
    if request.check is not None:
        request.check(model, stores)
    device = request.device
    model._apply(lambda tensor: tensor if tensor.is_meta or device is None else tensor.to(device))
    return WithoutExperts(model, stores)


LOADERS = {"disk": _on_disk, "pinned": _in_memory}


def _causal_class(config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Returns the class that `AutoModelForCausalLM.from_pretrained` would load."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _load_rest(
    request: _Request, state: Mapping[str, TracedTensor], stores: Mapping[str, DiskStore]
) -> PreTrainedModel:
    """Loads a model with transformers' loader, which reads every tensor but those of the experts in stores."""
    # matrices in 4 bits are experts' and stay in the file, too
    of_experts = {part for store in stores.values() for piece in store.pieces.values() for part in stored(piece)}
    lock = threading.Lock()
    tensors: dict[str, Any] = dict(state)
    for name, tensor in state.items():
        piece = tensor.piece
        if isinstance(piece, Stored) and piece not in of_experts:
            tensors[name] = _Unread(piece, lock)
    device_map = None if request.device is None else {"": torch.device(request.device)}
    return request.model_class.from_pretrained(
        None, config=request.config, state_dict=tensors, dtype=request.dtype, device_map=device_map
    )


def _empty_experts(model: PreTrainedModel, stores: Mapping[str, ExpertStore]) -> None:
    """Replaces the experts' parameters by parameters on the meta device, which have shape and dtype alone."""
    for module in stores:
        experts = model.get_submodule(module)
        for name, tensor in expert_parameters(experts).items():
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            setattr(experts, name, nn.Parameter(empty, requires_grad=False))


def _load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the generation settings of a folder, as `from_pretrained` does."""
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        # without generation_config.json, older checkpoints hold the settings in config.json
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
