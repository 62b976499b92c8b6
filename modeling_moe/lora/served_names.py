# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives the factors of an adapter the names and layout of the checkpoint that a server loads.

A factor `b` is the matrix `b @ a` with ranks in the place of inputs. Whatever a conversion does to the rows of a matrix -
split, reorder or scale them - it therefore does to `b`, while `a` stays. So the conversions of weights convert factors.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoints import LazyTensor, State
from ..configuration_moe import MoEConfig
from ..conversion import FAMILIES, TARGETS, moe_config
from ..utils.errors import UserError
from .factors import Factors, meta_model


EXPERT = re.compile(r"\.experts\.(\d+)\.")
# the parts of a layer's matrices alternate in a checkpoint, so the factors of as many matrices are kept
MATRICES_AT_ONCE = 4
STACKED = (".experts.gate_up_proj", ".experts.down_proj")


@dataclass(frozen=True)
class Update:
    """The low-rank update of one tensor of a checkpoint on disk.

    Attributes:
        a: first factor, (R, M); for a tensor that holds all E experts, PEFT's (E * R, M).
        b: second factor, (N, R); for a tensor that holds all E experts, in the tensor's layout with R for M.
        scaling: factor of the update.
        rank: rank R of the update.
        source: the factors as the adapter's file has them.
        stacked: whether the tensor holds all experts.
    """

    a: LazyTensor
    b: LazyTensor
    scaling: float
    rank: int
    source: Factors
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        columns = self.a.shape[1]
        if not self.stacked:
            return (self.b.shape[0], columns)
        experts, rows, ranks = self.b.shape
        return (experts, columns, ranks) if self.source.transposed else (experts, rows, columns)


Updates = dict[str, Update]
"""The updates by the names of the checkpoint's tensors."""


def _update(factors: Factors, name: str, b: LazyTensor) -> Update:
    """Returns the update of the tensor `name` on disk, to which `factors` belong.

    Raises:
        UserError: if the checkpoint's layout has no place for ranks.
    """
    stacked = len(b.shape) == 3
    match = EXPERT.search(name)
    ranks = b.shape[1] if stacked and factors.transposed else b.shape[-1]
    if ranks != factors.rank or (factors.experts is not None and not stacked and match is None):
        raise UserError(
            f"the adapter's factors of {factors.parameter} have no place in the tensor {name} of the base model on disk: merge "
            "the adapter with moe merge_adapter"
        )
    expert = int(match[1]) if match and factors.experts is not None else None
    a = factors.saved_a if stacked else factors.a_of(expert)
    return Update(a, b, factors.scaling, factors.rank, factors, stacked)


def on_disk(factors: list[Factors], config: PreTrainedConfig, trust_remote_code: bool = False) -> Updates:
    """Returns the updates under the names of the checkpoint that the adapter's own base model has on disk.

    Args:
        factors: as [`~modeling_moe.lora.factors.read_factors`] returns them.
        config: configuration of the model that the adapter was trained on.
        trust_remote_code: whether the model's own code may run.

    Raises:
        UserError: if the checkpoint's layout has no place for low-rank factors.
    """
    model = meta_model(config, trust_remote_code)
    by_name = {each.parameter: each for each in factors}

    @lru_cache(MATRICES_AT_ONCE)
    def read(name: str) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(model, {name: by_name[name].read_b()})

    updates: Updates = {}
    for each in factors:
        probe = torch.empty(each.b_shape, dtype=each.saved_b.dtype, device="meta")
        for name, tensor in revert_weight_conversion(model, {each.parameter: probe}).items():
            b = LazyTensor(tuple(tensor.shape), tensor.dtype, _part_of(read, each.parameter, name))
            updates[name] = _update(each, name, b)
    return updates


def _part_of(
    read: Callable[[str], dict[str, torch.Tensor]], parameter: str, name: str
) -> Callable[[tuple[slice, ...]], torch.Tensor]:
    return lambda index: read(parameter)[name][index]


def _convert(state: State, base: PreTrainedConfig, config: MoEConfig, target: str) -> State:
    """Renames a checkpoint of the type of `base` to the model type `target`, as a conversion of weights does."""
    if base.model_type != MoEConfig.model_type:
        state = FAMILIES[base.model_type].tensors(state, config)
    return state if target == MoEConfig.model_type else TARGETS[target].tensors(state, config)


def renamed(updates: Updates, state: State, base: PreTrainedConfig, target: str) -> Updates:
    """Returns the updates under the names of an export of the base model to another family.

    Args:
        updates: under the names of the base model on disk.
        state: the base model's tensors on disk, of which only shapes and dtypes are used.
        base: configuration of the base model.
        target: model type of the export.

    Raises:
        UserError: if there is no such export, or it mixes the tensors that the adapter updates.
    """
    if target not in (MoEConfig.model_type, *TARGETS):
        raise UserError(f"served_model is a {target}, to which no model can be converted: leave --served_model out")
    config = moe_config(base)
    seen: set[str] = set()

    def probe(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        def load(index: tuple[slice, ...]) -> torch.Tensor:
            seen.add(name)
            return torch.empty(shape, dtype=dtype, device="meta")[index]

        return LazyTensor(shape, dtype, load)

    if absent := next((name for name in updates if name not in state), None):
        raise UserError(
            f"the base model on disk has no tensor {absent}: dequantise it first, and name that --base_model"
        )
    # a conversion compares the values of a tied head with those of the embedding, and probes have none
    kept = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    factors = {name: updates[name].b if name in updates else tensor for name, tensor in kept.items()}
    probes = {name: probe(name, tensor.shape, tensor.dtype) for name, tensor in factors.items()}
    real, result = _convert(factors, base, config, target), {}
    for name, tensor in _convert(probes, base, config, target).items():
        seen.clear()
        tensor.read()
        if not (sources := seen & set(updates)):
            continue
        if len(seen) > 1:
            raise UserError(
                f"{name} of the served model is made of {len(seen)} tensors of the base model, such as {min(seen)}, so the adapter "
                "has no factors of it: merge the adapter with moe merge_adapter, and convert the merged model"
            )
        result[name] = _update(updates[sources.pop()].source, name, real[name])
    return result
