# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module loads a model whose experts stay in the checkpoint, or in host memory, and never holds them all elsewhere."""

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoints import Source, open_source
from ..utils.errors import UserError
from .pieces import Piece, stored
from .stores import (
    DiskStore,
    ExpertStore,
    PinnedStore,
    expert_parameters,
    named_experts,
    refuse_quantised_experts,
    stores_of,
)
from .tracing import TracedTensor, trace, traced_state


class WithoutExperts(NamedTuple):
    """A model whose experts are not in it.

    Attributes:
        model: the model in evaluation mode; the parameters of its experts are on the meta device.
        stores: name of each experts module -> store of the layer's experts.
    """

    model: PreTrainedModel
    stores: Mapping[str, ExpertStore]


class _Unread:
    """A tensor of a file that transformers' loader reads when it asks for it; one is read at a time.

    The loader takes `tensor[...]` and calls `to` on the result, in several threads at once.
    """

    def __init__(self, piece: Piece, lock: threading.Lock):
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
            tensor = torch.empty(self.shape, dtype=dtype or self.dtype, device="cpu")
            self._piece.read_into(self._piece.full(), tensor)
            return tensor.to(device=device)


def load_without_experts(
    name_or_path: str | Path,
    tier: str = "disk",
    dtype: Any = "auto",
    device: Any = None,
    *,
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
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if config is None:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub)
    config = copy.deepcopy(config)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    refuse_quantised_experts(config, name_or_path)
    source = open_source(name_or_path, hub=hub)
    request = _Request(model_class or _causal_class(config, trust_remote_code), config, dtype, device)
    loaded = LOADERS[tier](request, source)
    loaded.model.config.name_or_path = loaded.model.name_or_path = str(name_or_path)
    return loaded


class _Request(NamedTuple):
    """What is to be loaded, and where to."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: Any
    device: Any


def _on_disk(request: _Request, source: Source) -> WithoutExperts:
    state = traced_state(source.state)
    stores = stores_of(trace(request.model_class, request.config, state, request.dtype), source.folder)
    model = _load_rest(request, state, stores)
    _empty_experts(model, stores)
    _load_generation_config(model, source.folder)
    return WithoutExperts(model, stores)


def _in_host_memory(request: _Request, source: Source) -> WithoutExperts:
    model = request.model_class.from_pretrained(source.folder, config=request.config, dtype=request.dtype)
    stores: dict[str, ExpertStore] = {}
    for name, experts in list(named_experts(model)):
        stores[name] = PinnedStore(expert_parameters(experts))
        # the memory of a layer that was copied to page-locked memory is free before the next one is copied
        _empty_experts(model, {name: stores[name]})
    if not stores:
        raise UserError(f"{source.folder} has no experts that transformers' experts interface calls: load it whole")
    device = request.device
    model._apply(lambda tensor: tensor if tensor.is_meta or device is None else tensor.to(device))
    return WithoutExperts(model, stores)


LOADERS = {"disk": _on_disk, "pinned": _in_host_memory}


def _causal_class(config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Returns the class that `AutoModelForCausalLM.from_pretrained` would load."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _load_rest(
    request: _Request, state: Mapping[str, TracedTensor], stores: Mapping[str, DiskStore]
) -> PreTrainedModel:
    """Loads a model with transformers' loader, which reads every tensor but those of the experts."""
    of_experts = {part for store in stores.values() for piece in store.pieces.values() for part in stored(piece)}
    lock = threading.Lock()
    tensors = {
        name: tensor if tensor.piece in of_experts else _Unread(tensor.piece, lock) for name, tensor in state.items()
    }
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
