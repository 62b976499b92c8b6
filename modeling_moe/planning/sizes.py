# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts the parameters of a simulated model by structure: experts, routers, embeddings, all others.

# E experts, K experts per token
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention_experts import attends
from ..monitoring import (
    SparseLayer,
    UnreachableRouting,
    active_parameters,
    embedding_modules,
    experts_modules,
    experts_per_token,
    sparse_layers,
)
from .simulation import SimulatedModel


# groups of the experts' matrices; expert parallelism divides the first one alone
EXPERTS = ("routed experts", "attention experts")
GROUPS = (*EXPERTS, "routers", "embeddings and head", "attention and others", "adapter")
# bits per number of NF4 with compressed statistics (arXiv:2305.14314): 4, 8 per 64 numbers, 32 per 256 of these scales
BITS_OF_NF4 = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Tensors:
    """Parameters of one kind.

    Attributes:
        params: number of parameters.
        nbytes: bytes of the parameters.
        trained: number of parameters that train.
        trained_bytes: bytes of the parameters that train.
        shardable: bytes of the parameters that the model's plan for tensor parallelism divides.
        trained_tensors: number of tensors that train.
    """

    params: int = 0
    nbytes: int = 0
    trained: int = 0
    trained_bytes: int = 0
    shardable: int = 0
    trained_tensors: int = 0


@dataclass(frozen=True)
class Sizes:
    """The parameters of a model, in which a shared matrix counts once.

    Attributes:
        groups: the parameters by kind, the keys of `GROUPS` that occur.
        active: parameters of the model without adapter that a token uses; None if the configuration does not name K.
        buffers: bytes of the buffers.
        largest_layer: bytes of the largest decoder layer, which FSDP gathers.
        expert_layer: bytes of the routed experts of the largest sparse layer.
        num_experts: number E of routed experts of a sparse layer; 0 without sparse layers.
        top_k: number K of routed experts per token; None if unknown or without sparse layers.
        sparse_layers: number of layers with routed experts; experts of attention are not counted among them.
        layers: number of decoder layers.
        hidden_size: width of the tokens.
        attention_layer: bytes of the experts of the largest layer of attention.
    """

    groups: dict[str, Tensors]
    active: int | None
    buffers: int
    largest_layer: int
    expert_layer: int
    num_experts: int
    top_k: int | None
    sparse_layers: int
    layers: int
    hidden_size: int
    attention_layer: int = 0

    @property
    def total(self) -> int:
        """Number of parameters without an adapter."""
        return sum(group.params for name, group in self.groups.items() if name != "adapter")

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts of networks and of attention."""
        return sum(group.nbytes for name, group in self.groups.items() if name in EXPERTS)

    @property
    def experts_in_4_bits(self) -> int:
        """Bytes of the experts of networks and of attention in NF4."""
        params = sum(group.params for name, group in self.groups.items() if name in EXPERTS)
        return round(params * BITS_OF_NF4 / 8)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(group.nbytes for group in self.groups.values()) + self.buffers

    @property
    def trained(self) -> int:
        """Number of parameters that train."""
        return sum(group.trained for group in self.groups.values())

    @property
    def trained_bytes(self) -> int:
        """Bytes of the parameters that train, and of their gradients."""
        return sum(group.trained_bytes for group in self.groups.values())


def sizes_of(simulated: SimulatedModel) -> Sizes:
    """Counts the parameters of a simulated model.

    Args:
        simulated: the model; experts in 4 bits (method qlora) have the bytes of NF4.
    """
    model = simulated.model
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    config, experts = inner.config, experts_modules(model)
    kinds = _kinds(model, inner, experts)
    sharded = _sharded_names(inner)
    groups = dict.fromkeys(GROUPS, Tensors())
    for name, parameter in model.named_parameters():
        kind = kinds.get(id(parameter), "adapter" if _is_adapter(name) else "attention and others")
        in_4_bits = simulated.method == "qlora" and kind in EXPERTS and parameter.dim() == 3
        nbytes = (
            round(parameter.numel() * BITS_OF_NF4 / 8) if in_4_bits else parameter.numel() * parameter.element_size()
        )
        groups[kind] = _plus(groups[kind], parameter, nbytes, any(pattern.search(name) for pattern in sharded))
    groups = {name: group for name, group in groups.items() if group.params}
    layers, routed = _decoder_layers(inner), _routed(model)
    networks, attention = ([x for x in experts if attends(x) == inside] for inside in (False, True))
    return Sizes(
        groups=groups,
        active=active_parameters(
            config, experts, sum(group.params for name, group in groups.items() if name != "adapter")
        ),
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        largest_layer=max((_nbytes(layer) for layer in layers), default=0),
        expert_layer=max(map(_nbytes, networks), default=0),
        num_experts=routed[0].num_experts if routed else 0,
        top_k=experts_per_token(config) if routed else None,
        sparse_layers=len(routed),
        layers=len(layers),
        hidden_size=next(inner.get_input_embeddings().parameters()).shape[-1],
        attention_layer=max(map(_nbytes, attention), default=0),
    )


def _plus(group: Tensors, parameter: nn.Parameter, nbytes: int, sharded: bool) -> Tensors:
    trains = parameter.requires_grad
    return Tensors(
        params=group.params + parameter.numel(),
        nbytes=group.nbytes + nbytes,
        trained=group.trained + parameter.numel() * trains,
        trained_bytes=group.trained_bytes + nbytes * trains,
        shardable=group.shardable + nbytes * sharded,
        trained_tensors=group.trained_tensors + trains,
    )


def _is_adapter(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def _kinds(model: nn.Module, inner: PreTrainedModel, experts: list[nn.Module]) -> dict[int, str]:
    """Returns the kind of each parameter that a module of the interface holds, by the parameter's id."""
    kinds = {}
    for module in embedding_modules(inner):
        kinds |= {id(parameter): "embeddings and head" for parameter in module.parameters()}
    try:
        routers = [layer.router for layer in sparse_layers(model) if layer.router is not None]
    except UnreachableRouting:
        routers = []
    for router in routers:
        for name, parameter in router.named_parameters():
            kinds[id(parameter)] = "adapter" if _is_adapter(f".{name}") else "routers"
    for module in experts:
        kind = EXPERTS[attends(module)]
        kinds |= {id(parameter): kind for parameter in module.parameters(recurse=False)}
    return kinds


def _routed(model: nn.Module) -> list[SparseLayer]:
    """Returns the layers with routed experts; experts of attention are none."""
    try:
        return [layer for layer in sparse_layers(model) if not attends(layer.experts)]
    except UnreachableRouting:
        return []


def _decoder_layers(inner: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules of the longest list of modules in a model, which are the decoder layers."""
    lists = [module for module in inner.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=_nbytes, default=nn.ModuleList()))


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _sharded_names(inner: PreTrainedModel) -> list[re.Pattern[str]]:
    """Returns patterns of the parameters that the model's plan for tensor parallelism divides."""
    plan = getattr(inner, "tp_plan", None) or {}
    names = [name for name, rule in plan.items() if "wise" in str(rule)]
    return [re.compile(re.escape(name).replace(r"\*", r"\d+") + r"(\.|$)") for name in names]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
