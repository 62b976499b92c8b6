# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds out which tensors and which configuration fields of a model change with the number of experts.

A model is built without data from its configuration, once with all experts and once with fewer. What differs between the
two is what the number of experts decides, so that no list of model families is needed.

# E experts, K experts per token
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..attention_experts import attends
from ..monitoring import SparseLayer, UnreachableRouting, idle_parameters, sparse_layers
from ..utils.errors import UserError


# parts of the names of the configuration fields that may give K; such a field is used only if a module of a sparse layer
# reads it
TOP_K_NAMES = ("top", "per_tok", "_k")


@dataclass(frozen=True)
class Axis:
    """Says where a tensor has an entry for each expert.

    Attributes:
        layer: index of the decoder layer.
        dim: the dimension of size E, or of size E + Z if Z entries that are no experts follow.
    """

    layer: int
    dim: int


@dataclass(frozen=True)
class Skeleton:
    """A model without data, and the sparse layers in it.

    Attributes:
        config: configuration of the model.
        model: the model on the meta device.
        layers: the sparse layers.
        num_experts: number E of experts of every sparse layer.
    """

    config: PreTrainedConfig
    model: PreTrainedModel
    layers: list[SparseLayer]
    num_experts: int

    def active_parameters(self, top_k: int | None) -> int | None:
        """Returns the number of parameters that a token uses if it chooses `top_k` experts; None if that is None."""
        if top_k is None:
            return None
        return self.model.num_parameters() - round(sum(idle_parameters(layer.experts, top_k) for layer in self.layers))


@dataclass(frozen=True)
class Reduction:
    """Says how a model gets fewer experts.

    Attributes:
        before: the model with all experts.
        after: the model with fewer experts.
        fields: changed fields of the language model's configuration, with their new values.
        axes: where the tensors of `before` that change have an entry for each expert, by the name of the tensor.
        most_per_token: number of experts that a token can choose in `after`.
        lowers_top_k: whether `fields` holds a lower number of experts per token.
    """

    before: Skeleton
    after: Skeleton
    fields: dict[str, Any]
    axes: dict[str, Axis]
    most_per_token: int
    lowers_top_k: bool = False


class Groups(NamedTuple):
    """Says how a router groups its experts.

    Attributes:
        count: number of groups of consecutive experts; 1 without groups.
        chosen: number of groups that a token may choose experts from.
    """

    count: int
    chosen: int


class _Fewer(NamedTuple):
    """A model with fewer experts, the fields that made them fewer, and the tensors that became smaller."""

    after: Skeleton
    fields: dict[str, Any]
    axes: dict[str, Axis]


class _OtherShapes(Exception):
    """The number of experts decides shapes in a way that selecting experts cannot follow; the message names a tensor."""


def model_without_data(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model on the meta device: the class that `config.architectures` names, or else the causal LM.

    Args:
        config: configuration of a checkpoint.
        trust_remote_code: whether Python code that the checkpoint brings may run.
    """
    names = getattr(config, "architectures", None) or [""]
    named = getattr(transformers, names[0], None)
    with torch.device("meta"):
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.config_class is type(config):
            return named(copy.deepcopy(config))
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Skeleton:
    """Builds a sparse model without data.

    Raises:
        UserError: if the model has no experts that can be reached, layers with different numbers of experts, or several sparse
            layers of one index.
    """
    model = model_without_data(config, trust_remote_code=trust_remote_code)
    layers = indexed_layers(model)
    counts = sorted({layer.num_experts for layer in layers})
    if len(counts) > 1:
        raise UserError(
            f"the sparse layers of {type(model).__name__} have {' and '.join(map(str, counts))} experts: only a model with "
            "equally many in all layers can be pruned"
        )
    return Skeleton(config, model, layers, counts[0])


def indexed_layers(model: PreTrainedModel) -> list[SparseLayer]:
    """Returns the sparse layers of a model, each of which has an index of its own; experts inside attention are left out.

    Raises:
        UserError: if the model is dense, its experts cannot be reached, or two of its layers have the same index.
    """
    try:
        layers = [layer for layer in sparse_layers(model) if not attends(layer.experts)]
    except UnreachableRouting as error:
        raise UserError(str(error)) from error
    if not layers:
        raise UserError(f"{type(model).__name__} has experts inside attention alone, whose number cannot be changed")
    if len({layer.layer for layer in layers}) < len(layers):
        raise UserError(
            f"{type(model).__name__} has several sparse layers of one index, as a model of several towers has: take the "
            "language model alone"
        )
    return layers


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the part of a configuration that describes the language model.

    Raises:
        UserError: if the model has several language models, as one that also speaks has.
    """
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise UserError(
            f"{type(config).__name__} describes several language models: take one of them alone"
        ) from error


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that a checkpoint of the model holds, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def block_prefix(layer: SparseLayer) -> str:
    """Returns the beginning of the names of all tensors in the block that holds the experts and their router."""
    return layer.name.rpartition(".")[0] + "."


def with_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns a copy of a configuration in which fields of the language model have other values."""
    changed = copy.deepcopy(config)
    text = text_config(changed)
    for name, value in fields.items():
        setattr(text, name, value)
    return changed


def _axes(before: Skeleton, after: Skeleton) -> dict[str, Axis]:
    """Returns the tensors whose shapes differ between two models, with the place where they differ.

    Raises:
        _OtherShapes: if a tensor differs in another way than by having an entry less for each missing expert.
    """
    lost, old, new = before.num_experts - after.num_experts, shapes(before.model), shapes(after.model)
    if lost <= 0:
        raise _OtherShapes("the number of experts does not follow")
    axes = {}
    for name in sorted(old.keys() | new.keys()):
        sizes = old.get(name, ()), new.get(name, ())
        if sizes[0] == sizes[1] and name in old and name in new:
            continue
        dims = [dim for dim, (one, two) in enumerate(zip(*sizes, strict=False)) if one != two]
        inside = [layer for layer in before.layers if name.startswith(block_prefix(layer))]
        if len(sizes[0]) != len(sizes[1]) or len(dims) != 1 or len(inside) != 1:
            raise _OtherShapes(f"{name} would change from {sizes[0]} to {sizes[1]}")
        size = sizes[0][dims[0]]
        if size < before.num_experts or size - sizes[1][dims[0]] != lost:
            raise _OtherShapes(f"{name} would change from {sizes[0]} to {sizes[1]}")
        axes[name] = Axis(inside[0].layer, dims[0])
    return axes


def _replaced(value: Any, old: int, new: int) -> Any:
    """Returns a field's value with `new` in place of `old`, for a number or a list of equal numbers; else None."""
    if type(value) is int and value == old:
        return new
    if isinstance(value, list | tuple) and value and all(type(item) is int and item == old for item in value):
        return type(value)([new] * len(value))
    return None


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields of the language model's configuration, without the aliases of fields."""
    text = text_config(config)
    return {name: value for name, value in vars(text).items() if not name.startswith("_")}


def _follows(before: Skeleton, after: Skeleton, axes: Iterable[str]) -> bool:
    """Returns whether the experts of every sparse layer, and something beside the experts, have become fewer."""
    names = list(axes)
    for layer in before.layers:
        inside = [name for name in names if name.startswith(block_prefix(layer))]
        experts = [name for name in inside if name.startswith(layer.name + ".")]
        if not experts or len(experts) == len(inside):
            return False
    return [layer.name for layer in before.layers] == [layer.name for layer in after.layers]


def _with_fewer(before: Skeleton, keep: int, trust_remote_code: bool) -> _Fewer:
    """Returns the model with fewer experts, by trying each configuration field whose value is E.

    Raises:
        UserError: if no field, and no pair of fields, gives a model whose tensors are the kept parts of the old ones.
    """
    fields = {
        name: new
        for name, value in fields_of(before.config).items()
        if (new := _replaced(value, before.num_experts, keep)) is not None
    }
    by_name = {name: value for name, value in fields.items() if "expert" in name}
    singles = [{name: value} for name, value in sorted(fields.items(), key=lambda item: "expert" not in item[0])]
    reason = "no field of its configuration gives the number of experts alone"
    for changes in [*singles, by_name]:
        try:
            after = skeleton(with_fields(before.config, changes), trust_remote_code=trust_remote_code)
            axes = _axes(before, after)
        except _OtherShapes as error:
            if any("expert" in name for name in changes):
                reason = str(error)
            continue
        except Exception as error:  # a model with another width or number of heads may fail to be built in any way
            if any("expert" in name for name in changes):
                reason = (
                    f"{', '.join(changes)}={keep} fails with {type(error).__name__}: {' '.join(str(error).split())}"
                )
            continue
        if after.num_experts == keep and _follows(before, after, axes):
            return _Fewer(after, changes, axes)
    raise UserError(f"{type(before.model).__name__} cannot be pruned by selecting experts: {reason}")


def _numbers(model: PreTrainedModel, layers: list[SparseLayer]) -> dict[tuple[str, str], Any]:
    """Returns the numbers that the modules of the sparse layers have as attributes."""
    found = {}
    for layer in layers:
        block = model.get_submodule(block_prefix(layer)[:-1])
        for name, module in block.named_modules(prefix=layer.name):
            found |= {(name, key): value for key, value in vars(module).items() if type(value) is int}
    return found


def _lowered(value: Any, most: int) -> Any:
    """Returns a field's value with no number above `most`; None if the value is no number or list, or fits already."""
    if type(value) is int and value > most:
        return most
    if isinstance(value, list | tuple) and any(type(item) is int and item > most for item in value):
        return type(value)(min(item, most) for item in value)
    return None


def _lower_top_k(fewer: _Fewer, most: int, trust_remote_code: bool) -> dict[str, Any]:
    """Returns the fields that give more than `most` experts per token, with lower values.

    A field is lowered if a module of a sparse layer takes a number from it, and no shape changes. Other names of such a
    field, with an equal value, are lowered too, since another library may read them.
    """
    after, changes = fewer.after, {}
    numbers, known, fields = _numbers(after.model, after.layers), shapes(after.model), fields_of(after.config)
    candidates = {
        name: lower
        for name, value in fields.items()
        if name not in fewer.fields
        and any(part in name for part in TOP_K_NAMES)
        and (lower := _lowered(value, most)) is not None
    }
    for name, lower in candidates.items():
        lowered = skeleton(with_fields(after.config, {name: lower}), trust_remote_code=trust_remote_code)
        found = _numbers(lowered.model, lowered.layers)
        if shapes(lowered.model) == known and any(found.get(key) != number for key, number in numbers.items()):
            changes[name] = lower
    values = [fields[name] for name in changes]
    aliases = {name: lower for name, lower in candidates.items() if "expert" in name and fields[name] in values}
    return changes | aliases


def groups_of(config: PreTrainedConfig) -> Groups:
    """Returns how a router groups its experts, by the fields `n_group` and `topk_group`."""
    text = text_config(config)
    count = getattr(text, "n_group", None) or 1
    return Groups(count, (getattr(text, "topk_group", None) or count) if count > 1 else 1)


def _check_keep(before: Skeleton, keep: int, groups: Groups) -> None:
    """Refuses a number of experts that is out of range; a router with groups adds up the two best scores of a group."""
    most = before.num_experts - 1
    if groups.count == 1 and not 1 <= keep <= most:
        raise UserError(f"keep is {keep}: it must be from 1 to {most}, one less than the model's number of experts")
    if keep % groups.count or (not 2 * groups.count <= keep <= most and groups.count > 1):
        raise UserError(
            f"keep is {keep}: it must be a multiple of n_group ({groups.count}) from {2 * groups.count} to {most}, one less "
            "than the model's number of experts"
        )


def _refuse_tables(before: Skeleton) -> None:
    """Refuses a router with a table of expert ids, which names experts that would be dropped."""
    prefixes = tuple(block_prefix(layer) for layer in before.layers)
    for name, tensor in before.model.state_dict().items():
        if name.startswith(prefixes) and not tensor.is_floating_point() and tensor.ndim:
            raise UserError(
                f"{type(before.model).__name__} cannot be pruned: {name} is a table that sends tokens to fixed experts, "
                "also to those that would be dropped"
            )


def reduce(before: Skeleton, keep: int, *, trust_remote_code: bool = False) -> Reduction:
    """Finds out how a model gets fewer experts.

    Args:
        before: the model with all experts.
        keep: number of experts that each layer keeps.
        trust_remote_code: whether Python code that the checkpoint brings may run.

    Returns:
        The model with fewer experts. The number of experts per token is lowered where a token could not choose as many.

    Raises:
        UserError: if `keep` is out of range, or the model cannot be pruned by selecting experts; the message says why.
    """
    groups = groups_of(before.config)
    _check_keep(before, keep, groups)
    _refuse_tables(before)
    fewer = _with_fewer(before, keep, trust_remote_code)
    most = groups.chosen * (keep // groups.count)
    lower = _lower_top_k(fewer, most, trust_remote_code)
    after = fewer.after
    if lower:
        after = skeleton(with_fields(after.config, lower), trust_remote_code=trust_remote_code)
    return Reduction(before, after, fewer.fields | lower, fewer.axes, most, bool(lower))
