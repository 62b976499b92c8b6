# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lets routers of another kind than those of feed-forward networks read a configuration as if it were theirs."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .configuration_fields import settings_of
from .router_kinds import KINDS


# attribute of a configuration -> function from the configuration to the value that a router reads in its place
Replaced = dict[str, Callable[[Any], Any]]


@functools.cache
def _defaults_by_router(cls: type) -> dict[str, Any]:
    """Returns the default of each field that only some routers read."""
    declared = settings_of(cls)
    return {
        item.name: item.default
        for item in dataclasses.fields(cls)
        if item.name in declared and declared[item.name].by_router
    }


@functools.cache
def _properties(cls: type) -> dict[str, Callable[[Any], Any]]:
    """Returns the getters of the properties of a configuration class that transformers' base class does not have."""
    found = {}
    for base in reversed(cls.__mro__):
        if not issubclass(PreTrainedConfig, base):
            found |= {name: held.fget for name, held in vars(base).items() if isinstance(held, property)}
    return found


def _view(config: Any, kind: str) -> Any:
    """Returns the configuration as the routers of a kind read it."""
    return KINDS[kind].view(config)


class RoutingView:
    """A view of a configuration in which the routers of one kind find their own number of experts under the usual names.

    A field that only some routers read, and that these do not, has its default. Properties of the configuration, such as
    `has_capacity`, are computed from the view. Every other attribute is the configuration's, also after it was assigned.

    Args:
        config: the model's configuration.
        replaced: attributes that have another value here.
        reads: the fields declared with `by_router` that the routers read.
    """

    def __init__(self, config: Any, replaced: Replaced, reads: Collection[str]):
        self._config, self._replaced = config, replaced
        # looked up once, since torch.compile traces the lookups below
        defaults = _defaults_by_router(type(config))
        self._defaults = {name: default for name, default in defaults.items() if name not in reads}
        self._properties = _properties(type(config))

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_replaced", "_defaults", "_properties") or name.startswith("__"):
            raise AttributeError(name)  # of a copy that is not filled yet, or asked by a protocol of Python
        if name in self._replaced:
            return self._replaced[name](self._config)
        if name in self._defaults:
            return self._defaults[name]
        if name in self._properties:
            return self._properties[name](self)
        return getattr(self._config, name)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        """Pickles the view as the kind of routers that reads it, since functions without a name cannot be pickled."""
        present = [kind for kind, entry in KINDS.items() if entry.per_layer(self._config)]
        views = {kind: _view(self._config, kind) for kind in present}
        kind = next(kind for kind, view in views.items() if vars(view).get("_replaced") == self._replaced)
        return _view, (self._config, kind)
