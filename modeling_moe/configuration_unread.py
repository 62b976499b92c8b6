# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds fields that differ from their defaults although nothing in the configuration reads them."""

import functools
from dataclasses import fields
from typing import Any

from transformers.utils import logging

from .attention_catalogue import ROUTED_ATTENTION
from .configuration_derived import DERIVED
from .configuration_fields import HAS_DEPTH, Condition, Setting, settings_of, shown
from .model_depth import READS as DEPTH_READS
from .router import Router
from .router_catalogue import ROUTERS, router_class


logger = logging.get_logger(__name__)


@functools.cache
def _conditional(cls: type) -> dict[str, tuple[Setting, Any]]:
    """Returns metadata and default of each field that is not read in every configuration."""
    defaults = {item.name: item.default for item in fields(cls)}
    return {
        name: (declared, defaults[name])
        for name, declared in settings_of(cls).items()
        if declared.conditions or declared.by_router
    }


def routers_in_use(config: Any) -> list[type[Router]]:
    """Returns the router classes of the sparse feed-forward networks, each once; none if all are dense."""
    hashed = {index < config.num_hash_layers for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"}
    return [router_class(config, 0 if first else None) for first in sorted(hashed)]


def unread_fields(config: Any) -> dict[str, str]:
    """Returns the fields that nothing reads and that ask for something, each with the remedy that makes something read it."""
    routers, values, found = routers_in_use(config), config.__dict__, {}
    read = frozenset[str]().union(*(router.reads for router in routers))
    if config.routed_attention is not None and config.routed_attention in ROUTED_ATTENTION:
        read |= ROUTED_ATTENTION[config.routed_attention].reads
    if HAS_DEPTH.holds(config):
        read |= DEPTH_READS
    for name, (declared, default) in _conditional(type(config)).items():
        value = values[name]
        if value == default or value in declared.idle or (name in DERIVED and value == DERIVED[name](config)):
            continue
        if declared.by_router and name not in read:
            found[name] = _choose_router(config, name, routers)
        elif (unmet := _first_unmet(declared.conditions, config)) is not None:
            found[name] = unmet.remedy
    return found


def _first_unmet(conditions: tuple[Condition, ...], config: Any) -> Condition | None:
    return next((condition for condition in conditions if not condition.holds(config)), None)


def _choose_router(config: Any, name: str, routers: list[type[Router]]) -> str:
    if not routers:
        return "give mlp_layer_types a sparse layer"
    readers = [kind for kind, router in ROUTERS.items() if name in router.reads]
    if config.router_type in readers and config.num_hash_layers > 0:
        return "lower num_hash_layers"  # every sparse layer hashes
    return f"choose a router_type that reads it ({', '.join(readers)}) instead of {config.router_type!r}"


def refuse_unread(config: Any) -> None:
    """Refuses the first field that differs from its default although nothing in the configuration reads it.

    Raises:
        ValueError: names the field, the remedy and the value that asks for nothing.
    """
    for name, remedy in unread_fields(config).items():
        raise ValueError(
            f"{name} is {shown(getattr(config, name))}, which nothing reads: {remedy}, or set {name} to "
            f"{_plain_value(config, name)!r}."
        )


def _plain_value(config: Any, name: str) -> Any:
    return None if name in DERIVED else _conditional(type(config))[name][1]


def drop_unread(config: Any) -> None:
    """Sets the fields that nothing reads to their defaults, and warns once of them.

    Versions before 0.4.0 saved such fields; nothing has ever read them.
    """
    dropped = []
    # a field can be what another unread one is read by
    while unread := unread_fields(config):
        for name in unread:
            dropped.append(f"{name}={shown(getattr(config, name))}")
            setattr(config, name, _plain_value(config, name))
    if dropped:
        logger.warning_once(
            f"the configuration was saved by an earlier version with fields that nothing reads: {', '.join(dropped)}. They "
            "have their default values now; the model computes what it computed before."
        )
