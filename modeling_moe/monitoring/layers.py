# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the routed experts and the routers of any Mixture of Experts in transformers, by its interfaces.

Experts are found by the two attributes that `transformers.integrations.use_experts_implementation` sets on a module. Routers
are found by the `router_logits` that model classes declare in `_can_record_outputs`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder


class UnreachableRouting(ValueError):
    """The model has no routed experts that transformers' experts interface calls; the message is one sentence.

    Args:
        message: the sentence.
        dense: whether the model has no experts at all.
    """

    def __init__(self, message: str, *, dense: bool = False):
        super().__init__(message)
        self.dense = dense


@dataclass(frozen=True)
class SparseLayer:
    """A sparse layer of a model.

    Attributes:
        layer: index of the decoder layer.
        name: qualified name of the experts module in the model.
        experts: module that follows transformers' experts interface.
        num_experts: number E of experts of all processes together.
        router: module that returns the router logits before the experts are called; None if the model declares none.
        logits_index: position of the router logits in the router's output.
        returns_routing: whether the router is one of this package, which returns a [`~modeling_moe.router.Routing`].
    """

    layer: int
    name: str
    experts: nn.Module
    num_experts: int
    router: nn.Module | None
    logits_index: int = 0
    returns_routing: bool = False


def follows_experts_interface(module: nn.Module) -> bool:
    """Returns True for a module that holds routed experts and that transformers' experts interface calls."""
    # read from the instance: PEFT's layers around a module answer for the module
    return "has_gate" in vars(module) and "is_transposed" in vars(module)


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of any MoE that hold routed experts, on which transformers sets two attributes."""
    return [module for module in model.modules() if follows_experts_interface(module)]


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    """Returns the sparse layers of a model, in the order of the model.

    Args:
        model: any model of transformers, or a module that holds one: a model with adapters, in DDP, compiled.

    Raises:
        UnreachableRouting: if the model is dense, or if its experts do not follow transformers' experts interface.
    """
    found = [(name, module) for name, module in model.named_modules() if follows_experts_interface(module)]
    if not found:
        raise _unreachable(model)
    routers = _pair(model, [name for name, _ in found])
    layers = []
    for place, (name, module) in enumerate(found):
        number = re.search(r"\.(\d+)\.", f".{name}.")
        router = routers.get(name)
        own = None if router is None else _own_router(router.module)
        layers.append(
            SparseLayer(
                layer=int(number[1]) if number else place,
                name=name,
                experts=module,
                num_experts=count_experts(module) if own is None else own.num_experts,
                router=None if router is None else router.module,
                logits_index=0 if router is None else router.index,
                returns_routing=own is not None,
            )
        )
    return layers


def refuse_skipped_tokens(layers: Iterable[SparseLayer]) -> None:
    """Refuses layers that get some tokens of a batch alone (`depth_layers`), for what must know which token chose an expert.

    Raises:
        UnreachableRouting: names the first such layer.
    """
    for layer in layers:
        depth = getattr(getattr(layer.experts, "config", None), "depth_layers", None)
        if depth is not None and depth[layer.layer]:
            raise UnreachableRouting(
                f"{layer.name} gets only the tokens that depth_layers chooses, so that it cannot be told which token of a text "
                "has chosen an expert: count the chosen tokens of all texts together, by `modeling_moe.watch`."
            )


def sparse_block(model: nn.Module, layer: SparseLayer) -> nn.Module:
    """Returns the module that calls the experts of a sparse layer, outside the layers that PEFT puts around the experts."""
    name = layer.name.rpartition(".")[0]
    while hasattr(model.get_submodule(name), "base_layer"):
        name = name.rpartition(".")[0]
    return model.get_submodule(name)


def count_experts(experts: Any) -> int:
    """Returns the number of experts of a module; expert parallelism leaves a process a part of them as `num_experts`."""
    for parameter in experts.parameters(recurse=False):
        if isinstance(parameter, DTensor):
            return parameter.shape[0]
    return int(experts.num_experts)


def _own_router(router: nn.Module) -> Any | None:
    """Returns the router of this package, also of the code that a checkpoint contains, also inside PEFT's layers, or None."""
    return next((module for module in router.modules() if hasattr(module, "auxiliary_loss")), None)


class _Router(NamedTuple):
    """A module that returns router logits, and the position of the logits in its output."""

    name: str
    module: nn.Module
    index: int


def _recorders(model: nn.Module) -> Iterator[OutputRecorder]:
    """Yields what the classes of a model and of the models inside it declare as `router_logits`."""
    for module in model.modules():
        declared = (getattr(module, "_can_record_outputs", None) or {}) if isinstance(module, PreTrainedModel) else {}
        specs = declared.get("router_logits", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            yield spec if isinstance(spec, OutputRecorder) else OutputRecorder(spec, index=1)


def _declared_routers(model: nn.Module) -> list[_Router]:
    """Returns the modules whose output transformers would record as `router_logits`."""
    recorders = list({(spec.target_class, spec.index): spec for spec in _recorders(model)}.values())
    found = []
    for name, module in model.named_modules():
        for spec in recorders:
            if isinstance(spec.target_class, type) and isinstance(module, spec.target_class):
                found.append(_Router(name, module, spec.index))
                break
    return found


def _shared_path(one: str, other: str) -> list[str]:
    """Returns the beginning that two qualified names share, as parts."""
    shared = []
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return shared


def _pair(model: nn.Module, experts: list[str]) -> dict[str, _Router]:
    """Returns the router of each experts module that has one, by the experts' qualified name.

    A router belongs to the experts with which it shares the deepest parent. The hook goes on the child of the shared parent,
    because PEFT puts layers around a router.
    """
    declared = _declared_routers(model)
    pairs: dict[str, _Router] = {}
    for router in declared:
        depth = {name: len(_shared_path(router.name, name)) for name in experts}
        deepest = max(depth.values())
        for name in experts:
            if depth[name] < deepest or depth[name] < max(len(_shared_path(other.name, name)) for other in declared):
                continue
            found = _before_experts(model, router, name)
            if found is not None:
                pairs.setdefault(name, found)
    return pairs | _undeclared(model, [name for name in experts if name not in pairs], pairs)


def _undeclared(model: nn.Module, experts: list[str], pairs: dict[str, _Router]) -> dict[str, _Router]:
    """Returns the routers of experts whose model declares the routers of other layers alone, or none.

    In DeepSeek-V4 the first layers choose by token id, with a router of another class at the place of the others. A model can
    also declare no router at all.
    """
    found = {}
    places = {router.name.removeprefix(name.rpartition(".")[0] + "."): router for name, router in pairs.items()}
    for name in experts:
        parent = name.rpartition(".")[0]
        children = dict(model.get_submodule(parent).named_children())
        for place, router in places.items():
            if place in children:
                found[name] = _Router(f"{parent}.{place}", children[place], router.index)
        if name not in found:
            router = _by_shape(model, name)
            if router is not None:
                found[name] = router
    return found


def _by_shape(model: nn.Module, experts: str) -> _Router | None:
    """Returns the only module beside experts that has a matrix with a row for each expert; None without one.

    Before transformers 5.18 some models declared no router. Router logits of a wrong module would not explain the weights.
    """
    parent, _, own = experts.rpartition(".")
    children = {name: module for name, module in model.get_submodule(parent).named_children() if name != own}
    rows = count_experts(model.get_submodule(experts))
    found = [
        _Router(f"{parent}.{name}", module, 0)
        for name, module in children.items()
        if any(parameter.dim() == 2 and parameter.shape[0] == rows for parameter in module.parameters())
    ]
    return found[0] if len(found) == 1 else None


def _before_experts(model: nn.Module, router: _Router, experts: str) -> _Router | None:
    """Returns the child of the shared parent that holds the router and is called before the experts; None if unknown."""
    path = _shared_path(router.name, experts)
    if len(path) < router.name.count(".") + 1:
        name = ".".join(router.name.split(".")[: len(path) + 1])
        return _Router(name, model.get_submodule(name), router.index)
    # the declared module holds the experts: the only other module beside the experts is the router
    parent, _, own = experts.rpartition(".")
    others = [name for name, _ in model.get_submodule(parent).named_children() if name != own]
    if len(others) != 1:
        return None
    name = f"{parent}.{others[0]}"
    return _Router(name, model.get_submodule(name), 0)


def _unreachable(model: nn.Module) -> UnreachableRouting:
    """Returns the error that says why a model has no reachable experts."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    own = next((module for module in model.modules() if _holds_experts(module)), None)
    if own is None:
        return UnreachableRouting(f"{type(inner).__name__} is a dense model: there is no routing to see.", dense=True)
    return UnreachableRouting(
        f"{type(inner).__name__} computes its experts in {type(own).__name__}, which does not follow transformers' experts "
        "interface, so that its routing cannot be seen."
    )


def _holds_experts(module: nn.Module) -> bool:
    """Returns True for a module that looks like routed experts by the name that its parent or its class gives it."""
    return any("expert" in name and "shared" not in name for name, _ in module.named_children()) or bool(
        re.search(r"Experts?(?:MLP|FFN)?$|SparseMoe|MoE$", type(module).__name__)
    )
