# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How a field of the configuration is declared with its range, and what a value outside says."""

import dataclasses
import functools
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError


class Range(NamedTuple):
    """Numbers between two finite ends, each of which belongs to them or not; NaN and infinity lie in no range."""

    lowest: float | int
    highest: float | int
    open_below: bool = False
    open_above: bool = False

    def holds(self, value: float | int) -> bool:
        """Whether `value` lies in the range."""
        low = self.lowest < value if self.open_below else self.lowest <= value
        return low and (value < self.highest if self.open_above else value <= self.highest)

    def __str__(self) -> str:
        low, high = (x if isinstance(x, int) else f"{x:g}" for x in (self.lowest, self.highest))
        if not self.open_below and not self.open_above:
            return f"from {low} to {high}"
        return f"{'above' if self.open_below else 'at least'} {low} and {'below' if self.open_above else 'at most'} {high}"


class OutOfRange(ValueError):
    """What the check of a field's range says."""


def number(
    default: float | int | None,
    lowest: float | int | None = None,
    highest: float | int | None = None,
    *,
    above: float | int | None = None,
    below: float | int | None = None,
) -> Any:
    """A field of a `@strict` dataclass that holds a number (or a list of numbers) in a range; None passes.

    The range has a finite end on either side, and stands in the field's metadata under `"range"`.

    Args:
        default: value of the field where none is given.
        lowest, highest: ends that the field may have as its value.
        above, below: ends that it may not have, each in the place of the other kind.
    """
    low, high = lowest if above is None else above, highest if below is None else below
    if low is None or high is None:
        raise TypeError("a field's range needs two ends")
    limits = Range(low, high, above is not None, below is not None)

    def check(value: Any) -> None:
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(limits.holds(item) for item in values):
            raise OutOfRange(f"it must be {limits}")

    return dataclasses.field(default=default, metadata={"range": limits, "validator": [check]})


def shown(value: Any) -> str:
    """A value as a message shows it: its `repr`, cut to 80 characters; an integer too long for one by its bits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits, in a list too
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain_errors(cls: Any) -> Any:
    """Lets a `@strict` configuration raise ValueErrors in one sentence: `FIELD is VALUE: it must be ...`.

    `@strict` wraps what a check says in an error of its own, which is no ValueError and takes several lines. Aliases
    of a field (`attribute_map`), which `@strict` does not look at, are checked as the field is.
    """
    strict_setattr, strict_validate = cls.__setattr__, cls.validate

    def __setattr__(self, name: str, value: Any) -> None:
        field = self.attribute_map.get(name, name)
        value = self._current_value(field, value)
        try:
            strict_setattr(self, field, value)
        except StrictDataclassFieldValidationError as error:
            reason = error.__cause__
            if isinstance(reason, TypeError):
                kind = self.__dataclass_fields__[field].type
                text = kind.__name__ if isinstance(kind, type) else str(kind)
                reason = f"it must be of type {text.replace('typing.', '')}"
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
