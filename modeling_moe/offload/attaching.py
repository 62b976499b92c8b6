# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module takes the parameters out of an experts module and puts an expert cache in their place.

The parameters stay in the module as parameters on the meta device, which have shape and dtype and no memory. The class
of the module becomes a subclass that refuses what would go wrong in silence with empty parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from .cache import ExpertCache
from .forward import IMPLEMENTATION, Offloaded


class OffloadedModule(nn.Module):
    """OffloadedModule is the first base of the classes of offloaded experts.

    Attributes:
        offloaded: the cache of the layer, and the back end to ask for.
    """

    offloaded: Offloaded

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Applies what `to`, `half` and others do to submodules, and refuses to move or to cast the slots."""
        for tensor in self.offloaded.cache.slots.tensors.values():
            moved = fn(tensor[:0])
            if moved.device != tensor.device or moved.dtype != tensor.dtype:
                raise ValueError(
                    f"offloaded experts stay on {tensor.device} in {tensor.dtype} and cannot be moved to {moved.device} in "
                    f"{moved.dtype}: load the model again and move it before offload_experts"
                )
        own = self.__dict__["_parameters"]
        self.__dict__["_parameters"] = {}
        try:
            return super()._apply(fn, recurse)
        finally:
            self.__dict__["_parameters"] = own

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # PEFT takes the adapter's tensors out of the state dict of the whole model, and the experts are not among them
        if not prefix.startswith("base_model.model."):
            raise ValueError(
                "an offloaded model cannot be saved, since its experts are not in it: copy the checkpoint that it came "
                "from, or save an adapter from the PeftModel"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *args: Any, **kwargs: Any) -> None:
        names = [prefix + name for name in self.__dict__["_parameters"] if prefix + name in state_dict]
        if names:
            raise ValueError(
                f"{names[0]} cannot be loaded into offloaded experts: load the model first and offload it then"
            )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise ValueError("an offloaded model cannot be copied: load the model again and call offload_experts")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ValueError("an offloaded model cannot be pickled: load the model again and call offload_experts")


@functools.cache
def _offloaded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of offloaded experts of a class; it has the same name, which other packages compare."""
    return type(kind.__name__, (OffloadedModule, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def is_offloaded(module: nn.Module) -> bool:
    """Returns True if a module holds offloaded experts."""
    return isinstance(module, OffloadedModule)


def attach(module: Any, cache: ExpertCache, backend: str | None) -> None:
    """Puts a cache in the place of the parameters of an experts module.

    Args:
        module: experts that follow transformers' experts interface.
        cache: holds the experts of the layer.
        backend: the back end to ask for, or None for the fastest one.
    """
    for name, tensor in cache.slots.tensors.items():
        shape = (cache.num_experts, *tensor.shape[1:])
        module.register_parameter(
            name, nn.Parameter(torch.empty(shape, dtype=tensor.dtype, device="meta"), requires_grad=False)
        )
    module.offloaded = Offloaded(cache, backend)
    module.__class__ = _offloaded_class(type(module))
    module.config._experts_implementation = IMPLEMENTATION
