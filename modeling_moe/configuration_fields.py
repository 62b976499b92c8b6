# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module declares configuration fields: a default, a help text, a range, an effect, and who reads the field.

Each module of the model declares the fields that it reads as a group, a dataclass of [`setting`] calls. `MoEConfig`
inherits the groups, so that its JSON stays flat.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError


Effect = Literal["function", "training", "detail"]


class Range(NamedTuple):
    """A range of numbers between two finite ends; NaN and infinity belong to no range.

    Attributes:
        lowest, highest: the ends, which belong to the range unless the next two attributes exclude them.
        open_below: excludes `lowest`.
        open_above: excludes `highest`.
    """

    lowest: float | int
    highest: float | int
    open_below: bool = False
    open_above: bool = False

    def holds(self, value: float | int) -> bool:
        """Returns whether `value` belongs to the range."""
        low = self.lowest < value if self.open_below else self.lowest <= value
        return low and (value < self.highest if self.open_above else value <= self.highest)

    def __str__(self) -> str:
        low, high = (x if isinstance(x, int) else f"{x:g}" for x in (self.lowest, self.highest))
        if not self.open_below and not self.open_above:
            return f"from {low} to {high}"
        return f"{'above' if self.open_below else 'at least'} {low} and {'below' if self.open_above else 'at most'} {high}"


POSITIVE = Range(1e-6, 1e6)
COEFFICIENT = Range(0, 1e6)
PROBABILITY = Range(0, 1, open_above=True)


class OutOfRange(ValueError):
    """The range check of a field raises this error."""


class Condition(NamedTuple):
    """A condition on a configuration under which a field is read.

    Attributes:
        holds: takes the configuration and returns whether the condition holds.
        remedy: completes the sentence "to use the field, ...", such as "set swiglu_limit".
    """

    holds: Callable[[Any], bool]
    remedy: str


SPARSE = Condition(lambda config: "sparse" in config.mlp_layer_types, "give mlp_layer_types a sparse layer")
HAS_ROUTED_ATTENTION = Condition(lambda config: config.routed_attention is not None, "set routed_attention")
ROUTED = Condition(
    lambda config: SPARSE.holds(config) or HAS_ROUTED_ATTENTION.holds(config),
    f"{SPARSE.remedy} or {HAS_ROUTED_ATTENTION.remedy}",
)


HAS_DEPTH = Condition(lambda config: 1 in (config.depth_layers or ()), "give depth_layers a 1")
ROUTED_IN_ANY_WAY = Condition(
    lambda config: ROUTED.holds(config) or HAS_DEPTH.holds(config), f"{ROUTED.remedy} or {HAS_DEPTH.remedy}"
)


class Setting(NamedTuple):
    """The metadata of a field.

    Attributes:
        help: what the field means, in sentences that need no other field's help.
        limits: the range of the number, or of the numbers of a list; None for other types.
        choices: the names that the field, or each entry of its list, can have, among them None if it can be unset; None if
            its type says so.
        effect: "function" if the logits of evaluation depend on the field; "training" if only training, bookkeeping or the
            output format do; "detail" if it refines a feature that another field switches on.
        conditions: the field is read only where all of them hold.
        by_router: the field is read only if a router in use names it in `Router.reads`.
        idle: values other than the default that ask for nothing, and are accepted where nothing reads the field.
        follows: the expression that fills the field if it is None; None if the field has a default of its own.
    """

    help: str
    limits: Range | None
    choices: Collection[str | int | None] | None
    effect: Effect
    conditions: tuple[Condition, ...]
    by_router: bool
    idle: tuple[Any, ...]
    follows: str | None


def setting(
    default: Any,
    help: str,
    limits: Range | None = None,
    *,
    choices: Collection[str | int | None] | None = None,
    effect: Effect = "function",
    conditions: tuple[Condition, ...] = (),
    by_router: bool = False,
    idle: tuple[Any, ...] = (),
    follows: str | None = None,
) -> Any:
    """Declares a field of a `@strict` configuration; the arguments beside `default` are those of [`Setting`].

    The range check accepts None. A field with `follows` has the default None, is declared with the type that it has after
    construction, and accepts None as well (see [`accept_none`]).
    """

    def check(value: Any) -> None:
        values = value if isinstance(value, list) else [] if value is None else [value]
        if limits is not None and not all(limits.holds(item) for item in values):
            raise OutOfRange(f"it must be {limits}")

    declared = Setting(help, limits, choices, effect, conditions, by_router, idle, follows)
    metadata: dict[str, Any] = {"setting": declared, "validator": [] if limits is None else [check]}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """Returns the metadata of all fields that a configuration class declares by [`setting`], by their names."""
    return {item.name: item.metadata["setting"] for item in dataclasses.fields(cls) if "setting" in item.metadata}


def field_defaults(*groups: type) -> dict[str, Any]:
    """Returns the defaults of all fields of some groups, such as to switch a feature off by `config.replace(...)`."""
    return {item.name: item.default for group in groups for item in dataclasses.fields(group)}


def with_effect(cls: type, effect: Effect) -> set[str]:
    """Returns the names of the fields of a configuration class that have an effect of this kind."""
    return {name for name, declared in settings_of(cls).items() if declared.effect == effect}


def sparse_only(cls: type) -> set[str]:
    """Returns the names of the fields of a configuration class that nothing reads in a model without routers."""
    return {
        name
        for name, declared in settings_of(cls).items()
        if declared.by_router or {SPARSE, ROUTED, ROUTED_IN_ANY_WAY}.intersection(declared.conditions)
    }


def accept_none(cls: Any) -> Any:
    """Lets the fields of a configuration class that follow from others accept None; to be applied before `@strict`."""
    for item in dataclasses.fields(cls):
        if "setting" in item.metadata and item.metadata["setting"].follows is not None:
            declared: Any = item.type
            item.type = declared | None
    return cls


def shown(value: Any) -> str:
    """Returns a value as a message shows it: its `repr`, cut to 80 characters, or the number of bits of a huge integer."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits, in a list too
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def type_name(kind: Any) -> str:
    """Returns the name of a field's type without module names."""
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    text = text.replace("typing.", "").replace("transformers.modeling_rope_utils.", "")
    return f"{text[9:-1]} | None" if text.startswith("Optional[") else text


def plain_errors(cls: Any) -> Any:
    """Lets a `@strict` configuration raise a ValueError of one sentence: `FIELD is VALUE: it must be ...`.

    `@strict` itself raises an error that is not a ValueError and has several lines. `@strict` does not check the aliases of
    `attribute_map`; this decorator checks them like the fields that they name.
    """
    strict_setattr, strict_validate = cls.__setattr__, cls.validate

    def __setattr__(self, name: str, value: Any) -> None:
        field = cls.attribute_map.get(name, name)
        value = cls._current_value(field, value)
        try:
            strict_setattr(self, field, value)
        except StrictDataclassFieldValidationError as error:
            reason = error.__cause__
            if isinstance(reason, TypeError):
                reason = f"it must be of type {type_name(self.__dataclass_fields__[field].type)}"
            elif not isinstance(reason, OutOfRange):  # Python cannot write an integer of thousands of digits
                reason = "it must be a number of fewer digits"
            raise ValueError(f"{name} is {shown(value)}: {reason}.") from None

    @functools.wraps(strict_validate)
    def validate(self) -> None:
        try:
            strict_validate(self)
        except StrictDataclassClassValidationError as error:
            raise ValueError(str(error.__cause__)) from None

    cls.__setattr__, cls.validate = __setattr__, validate
    return cls
