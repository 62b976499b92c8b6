# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads the arguments of a new configuration that are not declared fields: aliases, misspelt names, others."""

import difflib
from typing import Any

import torch

from .configuration_fields import settings_of, shown


def refuse_misspelt(cls: Any, kwargs: dict[str, Any]) -> None:
    """Refuses an unknown argument whose name is close to that of a field; transformers would keep it and ignore it.

    Raises:
        ValueError: names the argument and the field.
    """
    declared = [name for name in settings_of(cls) if not name.endswith("_token_id")]
    for name in kwargs:
        if hasattr(cls, name) or name in cls.attribute_map or name.endswith("_token_id"):
            continue
        if close := difflib.get_close_matches(name, declared, n=1, cutoff=0.85):
            raise ValueError(f"unknown field {name!r} in MoEConfig: did you mean {close[0]!r}?")


def refuse_reserved(cls: Any, kwargs: dict[str, Any]) -> None:
    """Refuses an argument that would replace a method or a computed property.

    Raises:
        ValueError: names the argument.
    """
    if kwargs.get("per_layer_config"):
        raise ValueError(
            "per_layer_config is not read: say what layers differ in by layer_types, mlp_layer_types and no_rope_layers."
        )
    for name in kwargs:
        held = getattr(cls, name, None)
        if callable(held) or (isinstance(held, property) and held.fset is None):
            raise ValueError(f"{name} is no field that can be set: remove it, it follows from the others.")


def take_aliases(config: Any, kwargs: dict[str, Any]) -> None:
    """Moves values from aliases in `kwargs` to the fields that they name.

    Raises:
        ValueError: if a field and its alias have different values.
    """
    for alias, name in config.attribute_map.items():
        if alias not in kwargs:
            continue
        value, held = kwargs.pop(alias), getattr(config, name)
        if held not in (value, config.__dataclass_fields__[name].default):
            raise ValueError(f"{alias} is {shown(value)} and {name} {shown(held)}: they name one thing, give one.")
        setattr(config, alias, value)


def take_dense_layers(config: Any, kwargs: dict[str, Any]) -> None:
    """Moves `first_k_dense_replace` and `mlp_only_layers` from `kwargs` into `mlp_layer_types`.

    Raises:
        ValueError: if `mlp_layer_types` is given too and names other dense layers.
    """
    first, dense = (kwargs.pop(name, None) for name in ("first_k_dense_replace", "mlp_only_layers"))
    if first is None and dense is None:
        return
    kinds = kinds_of_layers(config.num_hidden_layers, first, dense)
    if config.mlp_layer_types not in (None, kinds):
        raise ValueError(
            "mlp_layer_types names other dense layers than first_k_dense_replace and mlp_only_layers do: give one."
        )
    config.mlp_layer_types = kinds


def kinds_of_layers(num_layers: int, first: int | None, dense: list[int] | None) -> list[str]:
    """Returns `mlp_layer_types` of a model whose first layers, and those listed, are dense.

    Args:
        num_layers: number of layers.
        first: number of leading dense layers (`first_k_dense_replace`).
        dense: indices of further dense layers (`mlp_only_layers`).

    Raises:
        ValueError: for a value that is not a number of layers, or a list with something else than indices of layers.
    """
    first, dense = 0 if first is None else first, [] if dense is None else dense
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"first_k_dense_replace is {shown(first)}: it must be a number of layers, 0 or more.")
    if not isinstance(dense, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_layers for i in dense
    ):
        raise ValueError(f"mlp_only_layers is {shown(dense)}: it must list layers from 0 to {num_layers - 1}.")
    return ["dense" if i < first or i in set(dense) else "sparse" for i in range(num_layers)]


def check_inherited(config: Any, kwargs: dict[str, Any]) -> None:
    """Checks arguments of transformers' base class that it does not check, or refuses with an unclear error.

    Raises:
        ValueError: names the argument.
    """
    for name, value in (("dtype", config.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{name} is {shown(value)}: it must be the name of a floating-point dtype of torch.")
    labels = kwargs.get("num_labels")
    if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int) or not 0 <= labels < 2**20):
        raise ValueError(f"num_labels is {shown(labels)}: it must be from 0 to {2**20 - 1}.")
    names = config.id2label
    if names is not None and not (
        isinstance(names, dict) and all(isinstance(key, int) or str(key).isdecimal() for key in names)
    ):
        raise ValueError(f"id2label is {shown(names)}: it must be a dictionary whose keys are integers.")
    if config.is_encoder_decoder:
        raise ValueError("is_encoder_decoder is True: the model has no encoder, set it to False.")
