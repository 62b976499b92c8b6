"""This module chooses which cases of a parametrised test run by default; the other cases are marked slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_default(chosen: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns all cases for `pytest.mark.parametrize`, and marks those that are not in `chosen` as slow.

    Raises:
        ValueError: if `chosen` has an element that is no case.
    """
    cases = list(cases)
    unknown = [case for case in chosen if case not in cases]
    if unknown:
        raise ValueError(f"{unknown} are no cases: choose from {cases}")
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def dashed(case: Any) -> str:
    """Returns the id of a case: the elements of a tuple with dashes between them."""
    return "-".join(map(str, case)) if isinstance(case, tuple) else str(case)


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Returns the values of the parameter `name` in the selected tests that use the requesting fixture.

    A fixture that prepares results for all tests of a module leaves out those that no test of this run needs.
    """
    found = []
    for item in request.session.items:
        case = item.callspec.params.get(name) if hasattr(item, "callspec") else None
        if item.path == request.path and request.fixturename in item.fixturenames and case is not None:
            found += [case] if case not in found else []
    return found
