# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module divides the parameters of any Mixture of Experts in transformers into groups by role, for an optimizer.

# E experts, K experts per token
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from ..lora import full_shape
from ..monitoring import (
    SparseLayer,
    UnreachableRouting,
    embedding_modules,
    experts_modules,
    experts_per_token,
    sparse_block,
    sparse_layers,
)
from ..utils.errors import UserError


Role = Literal["other", "attention", "shared", "expert", "router", "embedding"]
ROLES: tuple[Role, ...] = get_args(Role)
# name of a rate -> factor on the learning rate of experts of which a token uses `share`, K / E
SHARES: dict[str, Callable[[float], float]] = {"sqrt_share": math.sqrt, "share": float}
ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)(\.|$)")


def _outer(model: nn.Module, name: str) -> str:
    """Returns the name of the outermost layer that PEFT puts around a module, or the module's own."""
    while (parent := name.rpartition(".")[0]) and hasattr(model.get_submodule(parent), "base_layer"):
        name = parent
    return name


def _attention_classes(model: nn.Module) -> tuple[type, ...]:
    """Returns the classes whose output transformers records as `attentions`."""
    found = set()
    for module in model.modules():
        declared = (getattr(module, "_can_record_outputs", None) or {}) if isinstance(module, PreTrainedModel) else {}
        specs = declared.get("attentions", [])
        found |= {getattr(spec, "target_class", spec) for spec in (specs if isinstance(specs, list) else [specs])}
    return tuple(kind for kind in found if isinstance(kind, type))


def routed_layers(model: nn.Module) -> list[SparseLayer]:
    """Returns the sparse layers of a model, and none for a dense model.

    Raises:
        UserError: if the model has experts that do not follow transformers' experts interface.
    """
    try:
        return sparse_layers(model)
    except UnreachableRouting as error:
        if error.dense:
            return []
        raise UserError(f"the parameters cannot be divided by role: {error}") from error


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Returns the role of each parameter by name, found by interfaces and not by the names of a family.

    - `expert`: what the modules of transformers' experts interface hold, with the layers that PEFT puts around them;
    - `router`: what the modules that return router logits hold, those of `depth_layers` included, and what a sparse block holds
      directly;
    - `shared`: what a sparse block holds besides, such as shared experts and their gate, which every token uses;
    - `attention`: the modules whose output transformers records as `attentions`, and modules named as attention, without the
      experts and the router that may be in them;
    - `embedding`: embeddings of tokens and positions, and the head;
    - `other`: dense feed-forward networks, norms, recurrent layers, linear attention; also a network that every token uses
      beside the sparse block and not in it (Gemma 4's `mlp`, Granite's `shared_mlp`).

    Args:
        model: any causal LM of transformers, also with adapters, in DDP or FSDP2.

    Raises:
        UserError: if the model has experts that do not follow transformers' experts interface.
    """
    classes, roles = _attention_classes(model), {}
    names = {id(module): name for name, module in model.named_modules()}
    attentions = {
        name
        for name, module in model.named_modules()
        if isinstance(module, classes) or ATTENTION.search(name.rpartition(".")[2])
    }
    places: dict[str, Role] = dict.fromkeys(attentions, "attention")
    for layer in routed_layers(model):
        block = names[id(sparse_block(model, layer))]
        # what attention holds beside its own experts and router is attention
        if block not in attentions and not any(_inside(name, block) for name in attentions):
            places[block] = "shared"
            roles |= {
                f"{block}.{name}": "router" for name, _ in model.get_submodule(block).named_parameters(recurse=False)
            }
        places[_outer(model, layer.name)] = "expert"
        if layer.router is not None:
            places[names[id(layer.router)]] = "router"
    for name, module in model.named_modules():
        # a router of this package; those of `depth_layers` belong to no sparse layer
        if hasattr(module, "auxiliary_loss"):
            places[name] = "router"
    for base in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        for module in embedding_modules(base):
            places[names[id(module)]] = "embedding"
    return {name: roles.get(name) or _role_at(name, places) for name, _ in model.named_parameters()}


def _inside(name: str, parent: str) -> bool:
    return name.startswith(f"{parent}.")


def _role_at(name: str, places: Mapping[str, Role]) -> Role:
    """Returns the role of the innermost module that has one and holds a parameter."""
    while name := name.rpartition(".")[0]:
        if name in places:
            return places[name]
    return "other"


def decayed_names(model: nn.Module) -> set[str]:
    """Returns the parameters that weight decay shrinks: neither norms, biases nor learned factors.

    transformers finds norms and biases by their names, which learned factors such as a router's `expert_scale` lack. Therefore
    parameters of one dimension are left out too; the dimension that counts experts does not count.
    """
    # the method reads nothing of the Trainer
    named = Trainer.get_decay_parameter_names(cast(Any, None), model)
    stacked = {id(weight) for module in experts_modules(model) for weight in module.parameters(recurse=False)}
    return {
        name
        for name, parameter in model.named_parameters()
        if name in named and len(full_shape(parameter)) >= 2 + (id(parameter) in stacked)
    }


def _check(given: Mapping[str, Any], trained: set[Role], what: str) -> None:
    for role in given:
        if role not in ROLES:
            raise UserError(f"{what} {role!r} is no role: choose among {', '.join(ROLES)}")
        if role not in trained:
            raise UserError(f"{what} {role} has no effect: the model trains no parameter of this role")


def _factor(rate: float | str, role: Role, share: float | None) -> float:
    """Returns the factor of a rate on the learning rate."""
    if isinstance(rate, str) and rate not in SHARES:
        raise UserError(f"rate {rate!r} is unknown: give a number, or for experts one of {', '.join(SHARES)}")
    if isinstance(rate, str):
        if role != "expert":
            raise UserError(f"rate {rate} is for experts, not for {role}: give a number")
        if share is None:
            raise UserError(
                f"rate {rate} needs the number of experts per token, which config.json does not name: give a number"
            )
        return SHARES[rate](share)
    if not 0 <= rate < math.inf:
        raise UserError(f"rate {rate} of {role}: it must be a number from 0")
    return float(rate)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    *,
    rates: Mapping[str, float | str] | None = None,
    weight_decays: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Returns the trained parameters of any MoE in groups by role, for any optimizer of torch.

    Norms, biases and learned factors have no weight decay, see [`decayed_names`]. `sqrt_share` follows the square-root scaling
    of Adam's learning rate with the batch (Malladi et al., arXiv:2205.10287): in balance an expert sees K / E of the tokens of a
    batch. `share`, K / E, is the linear scaling for SGD.

    Args:
        model: any causal LM of transformers, also with adapters, in DDP or FSDP2.
        learning_rate: learning rate of the roles that `rates` does not name.
        weight_decay: weight decay of the roles that `weight_decays` does not name.
        rates: role -> factor on `learning_rate`; for `expert` also `sqrt_share` for sqrt(K / E), or `share` for K / E.
        weight_decays: role -> weight decay.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `role`, none of them empty; those with the plain `learning_rate` come
        first, since `Trainer` logs the rate of the first group.

    Raises:
        UserError: if a role is unknown or not trained, a rate is unknown, a weight decay is below 0, or the experts cannot be
            reached.

    Example:
        >>> groups = parameter_groups(model, 1e-4, 0.1, rates={"router": 0.1, "expert": "sqrt_share"})
        >>> trainer = Trainer(model=model, args=args, optimizers=(torch.optim.AdamW(groups), None))
    """
    rates, weight_decays = rates or {}, weight_decays or {}
    roles, shares = parameter_roles(model), _shares(model)
    decayed = decayed_names(model)
    trained = {roles[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check(rates, trained, "rate")
    _check(weight_decays, trained, "weight decay")
    for role, decay in weight_decays.items():
        if not 0 <= decay < math.inf:
            raise UserError(f"weight decay {decay} of {role}: it must be a number from 0")
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles[name]
        share = next((share for place, share in shares.items() if _inside(name, place)), None)
        factor = _factor(rates.get(role, 1.0), role, share)
        decay = weight_decays.get(role, weight_decay) if name in decayed else 0.0
        # torch's fused steps take parameters of one device mesh
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        group = {"params": [], "lr": learning_rate * factor, "weight_decay": decay, "role": role}
        groups.setdefault((factor != 1, ROLES.index(role), factor, decay == 0, mesh), group)["params"].append(
            parameter
        )
    return [groups[key] for key in sorted(groups, key=lambda key: key[:4])]


def _shares(model: nn.Module) -> dict[str, float | None]:
    """Returns K / E of the experts below each experts module, by the module's name with PEFT's layers; None if K is unknown."""
    config = next((module.config for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    named = None if config is None else experts_per_token(config)
    shares: dict[str, float | None] = {}
    for layer in routed_layers(model):
        # the routers of attention, which are this package's, have a K of their own
        own: Any = layer.router.modules() if layer.router is not None and layer.returns_routing else ()
        top_k = next((module.top_k for module in own if hasattr(module, "top_k")), named)
        shares[_outer(model, layer.name)] = None if top_k is None else min(1.0, top_k / layer.num_experts)
    return shares
