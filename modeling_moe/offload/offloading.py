# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives each layer of experts of a model an expert cache.

# S slots of a layer, E experts, K experts per token
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..attention_experts import attends
from ..dispatch import NAMES, follows_interface, reason_unsupported
from ..monitoring import experts_per_token
from ..utils.sizes import parse_size
from .attaching import OffloadedModule, attach, is_offloaded
from .cache import ExpertCache
from .policies import policy_class
from .prefetch import prefetch_experts
from .slots import ExpertSlots, slot_bytes
from .statistics import LayerStatistics, OffloadStatistics
from .stores import ExpertStore, PinnedStore, disk_stores, expert_parameters


TIERS = ("pinned", "disk")


class _Layer(NamedTuple):
    """_Layer holds the experts of one layer.

    Attributes:
        name: the qualified name of the experts module.
        module: the experts module.
        store: where the experts are read from.
    """

    name: str
    module: Any
    store: ExpertStore

    @property
    def slot_bytes(self) -> int:
        """The bytes of one slot."""
        return sum(slot_bytes(shape, dtype) for shape, dtype in self.store.parts.values())


def offload_experts(
    model: nn.Module,
    budget: int | str | None = None,
    slots: int | None = None,
    tier: str = "pinned",
    policy: str = "lfru",
    folder: str | Path | None = None,
    prefetch: int | None = None,
) -> OffloadStatistics:
    """Takes the experts of a model out of the memory of its device, but for those that are in use.

    The model then computes what it computed before: on CPUs bit for bit what it computes with
    `experts_implementation="moe"`, or with the back end of this package that the model had been given.

    Args:
        model: a model in memory, this package's or one of transformers', with or without an adapter. It is changed.
        budget: bytes of all slots of all layers, or text such as `"4GiB"`. Give this or `slots`.
        slots: the number S of experts of each layer that are held.
        tier: `"pinned"` keeps the experts in host memory, `"disk"` reads them from the checkpoint in `folder`. On CPUs the
            pinned experts stay in the memory in which they lie. After `from_pretrained` that may be the mapped files of
            the checkpoint, which must then stay as they are; `from_pretrained_offloaded` reads them into memory.
        policy: a key of [`~modeling_moe.offload.policies.POLICIES`], which chooses the expert that gives up its slot.
        folder: with `tier="disk"`, the checkpoint that holds the model's weights; by default where the model was loaded
            from.
        prefetch: loads experts ahead of each layer, with this many beyond those that the next router chooses, as
            [`~modeling_moe.offload.prefetch.prefetch_experts`] does; None loads none ahead.

    Returns:
        The counts of all layers, which go on counting while the model runs.

    Raises:
        ValueError: for a model without experts that can be offloaded, and for arguments that do not fit the model.

    Example:
        >>> import torch
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> from modeling_moe.offload import offload_experts
        >>> config = MoEConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=8)
        >>> model = MoEForCausalLM(config).eval()
        >>> statistics = offload_experts(model, slots=4)
        >>> output = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
        >>> statistics.total.misses > 0
        True
    """
    modules = _experts_of(model)
    if tier not in TIERS:
        raise ValueError(f"tier={tier!r} is unknown: use 'pinned' or 'disk'")
    if tier == "pinned":
        if folder is not None:
            raise ValueError("folder is read with tier='disk' only: set tier='disk' or leave folder out")
        stores: Mapping[str, ExpertStore] = {
            name: PinnedStore(expert_parameters(module)) for name, module in modules.items()
        }
    else:
        stores = _disk_stores_of(model, modules, folder)
    return offload_to_stores(model, stores, budget, slots, policy, prefetch=prefetch)


def offload_to_stores(
    model: nn.Module,
    stores: Mapping[str, ExpertStore],
    budget: int | str | None = None,
    slots: int | None = None,
    policy: str = "lfru",
    device: torch.device | str | None = None,
    prefetch: int | None = None,
) -> OffloadStatistics:
    """Puts expert caches over given stores in the place of a model's experts.

    Args:
        model, budget, slots, policy, prefetch: as for [`offload_experts`]. The experts' parameters may be on the meta device.
        stores: qualified name of each experts module -> store of the layer's experts.
        device: where the experts are computed; by default where the model's first parameter is that has memory.

    Returns:
        The counts of all layers.

    Raises:
        ValueError: as for [`offload_experts`].
    """
    modules = _experts_of(model)
    if missing := [name for name in modules if name not in stores]:
        raise ValueError(f"stores has no store for {missing[0]}: give one for each layer")
    layers = [_Layer(name, module, stores[name]) for name, module in modules.items()]
    _refuse_prefetch(prefetch)
    counts = _slots_of_layers(layers, budget, slots)
    make_policy, place = policy_class(policy), torch.device(device) if device is not None else _device_of(model)
    # layers share their configuration, which `attach` changes
    backends = [_backend_of(layer.module) for layer in layers]
    for layer, number, backend in zip(layers, counts, backends, strict=True):
        memory = ExpertSlots(layer.store.parts, number, layer.store.num_experts, place)
        policy_of_layer = make_policy(number, layer.store.num_experts)
        attach(layer.module, ExpertCache(layer.store, policy_of_layer, memory, LayerStatistics()), backend)
    if prefetch is not None:
        prefetch_experts(model, extra=prefetch)
    return offload_statistics(model)


def refuse_unfit(
    model: nn.Module,
    stores: Mapping[str, ExpertStore],
    budget: int | str | None,
    slots: int | None,
    policy: str,
    prefetch: int | None,
) -> None:
    """Raises what [`offload_to_stores`] raises; the model may be on the meta device, before any weight is read."""
    layers = [_Layer(name, module, stores[name]) for name, module in _experts_of(model).items()]
    _slots_of_layers(layers, budget, slots)
    policy_class(policy)
    _refuse_prefetch(prefetch)


def _refuse_prefetch(prefetch: Any) -> None:
    if prefetch is not None and (type(prefetch) is not int or prefetch < 0):
        raise ValueError(
            f"prefetch={prefetch!r} is no number of experts: give how many to load ahead beyond the predicted ones, 0 or "
            "more, or None"
        )


def offload_statistics(model: nn.Module) -> OffloadStatistics:
    """Returns the counts of all layers of an offloaded model, which go on counting while the model runs.

    Raises:
        ValueError: if the model is not offloaded.
    """
    layers = {
        name: module.offloaded.cache.statistics
        for name, module in model.named_modules()
        if isinstance(module, OffloadedModule)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} is not offloaded: call offload_experts first")
    return OffloadStatistics(layers)


def _experts_of(model: nn.Module) -> dict[str, Any]:
    """Returns the experts modules of a model by name, without those inside attention, which stay in memory.

    Raises:
        ValueError: if there is none, or one of them cannot be offloaded.
    """
    modules: dict[str, Any] = {
        name: module for name, module in model.named_modules() if not attends(module) and follows_interface(module)
    }
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no experts that transformers' experts interface calls: load it whole"
        )
    for name, module in modules.items():
        if is_offloaded(module):
            raise ValueError(f"{name} is offloaded already: load the model again to offload it otherwise")
        if reason := _reason_against(module):
            raise ValueError(f"{name} ({type(module).__name__}) cannot be offloaded: {reason}")
    return modules


def _reason_against(module: Any) -> str | None:
    """Returns why experts cannot be offloaded, or None if they can."""
    if reason := reason_unsupported(module):
        return reason
    if getattr(module.config, "router_type", None) == "lory":
        return "router_type='lory' merges all experts for each segment, so all of them must be in memory"
    up = "gate_up_proj" if module.has_gate else "up_proj"
    own = module._parameters
    if up not in own or "down_proj" not in own:
        return "its matrices are not plain parameters (quantised ones are not): load the model in 16 bits"
    split = [
        name for name, tensor in own.items() if type(tensor) is not nn.Parameter or hasattr(tensor, "device_mesh")
    ]
    if split or len(own[up]) != module.num_experts:
        return f"its {(split or [up])[0]} is split over processes: load the model without distributed_config"
    return None


def _backend_of(module: Any) -> str | None:
    """Returns the back end that a module's experts implementation asks for, or None.

    Transformers has implementations of its own, and one of them, `"grouped_mm"`, has the name of a back end.
    """
    implementation = module.config._experts_implementation
    return next((name for name in NAMES if implementation == f"moe_{name}"), None)


def _device_of(model: nn.Module) -> torch.device:
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


def _disk_stores_of(model: Any, modules: Mapping[str, Any], folder: str | Path | None) -> Mapping[str, ExpertStore]:
    """Opens the checkpoint of a model in memory, and compares one expert of each layer.

    Raises:
        ValueError: if the model is not a whole model of transformers, or differs from the checkpoint.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    folder = folder or getattr(base, "name_or_path", None)
    if not folder:
        raise ValueError("tier='disk' needs the checkpoint that the model came from: set folder")
    dtype = next(iter(modules.values())).down_proj.dtype
    found = disk_stores(type(base), base.config, folder, dtype)
    stores = {}
    for name, module in modules.items():
        inner = next((own for own, other in base.named_modules() if other is module), name)
        if inner not in found:
            raise ValueError(f"{folder} has no experts for {name}: set folder to the model's own checkpoint")
        stores[name] = found[inner]
        _compare(name, module, stores[name], folder)
    return stores


def _compare(name: str, module: Any, store: ExpertStore, folder: str | Path) -> None:
    """Raises ValueError if the last expert of a layer in memory is not the checkpoint's."""
    parameters, last = expert_parameters(module), store.num_experts - 1
    read = {part: torch.empty(shape, dtype=dtype) for part, (shape, dtype) in store.parts.items()}
    store.read(last, read)
    for part, tensor in parameters.items():
        if part not in read or not torch.equal(tensor[last].detach().cpu(), read[part]):
            raise ValueError(
                f"{name}.{part} differs from the checkpoint in {folder}, so the model was changed after it was loaded: save "
                "it and set folder, or use tier='pinned'"
            )


def _slots_of_layers(layers: list[_Layer], budget: int | str | None, slots: int | None) -> list[int]:
    """Returns the number of slots of each layer: as many for each as the budget allows, and at most E.

    Raises:
        ValueError: unless exactly one of `budget` and `slots` is given, or if it is too small.
    """
    if (budget is None) == (slots is None):
        raise ValueError("give either budget, such as '4GiB', or slots, the number of experts of each layer")
    if slots is not None and type(slots) is not int:
        raise ValueError(f"slots={slots!r} is no whole number: give the number of experts of each layer that are held")
    experts = [layer.store.num_experts for layer in layers]

    def cost(number: int) -> int:
        return sum(min(number, most) * layer.slot_bytes for layer, most in zip(layers, experts, strict=True))

    least = max(_top_k(layer.module) for layer in layers)
    if slots is None:
        assert budget is not None
        allowed = parse_size(budget, "budget")
        slots = next((number for number in range(max(experts), 0, -1) if cost(number) <= allowed), 0)
        given = f"budget={budget!r} holds {slots}"
    else:
        given = f"slots={slots} holds {slots}"
    if slots < least:
        raise ValueError(
            f"{given} experts of each layer, and one token needs {least}: set slots to at least {least}, or budget to at "
            f"least {cost(least)} (bytes)"
        )
    return [min(slots, most) for most in experts]


def _top_k(module: Any) -> int:
    """Returns the number K of experts per token of a module's configuration, or 1 if no field says so."""
    return min(experts_per_token(module.config) or 1, module.num_experts)
