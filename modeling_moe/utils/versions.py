# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""At import, this package warns of installed releases of other packages with which it was not tested."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from transformers.utils import logging


logger = logging.get_logger(__name__)


def untested(distribution: str = "modeling-moe") -> list[str]:
    """Returns installed packages whose release lies outside the bounds that a distribution declares; extras are ignored.

    Args:
        distribution: name that pip knows; a distribution that is not installed has no bounds.

    Returns:
        One text for each package, such as `"transformers 5.99.0 (tested: >=5.17,<5.25)"`.
    """
    found = []
    try:
        requirements = [Requirement(text) for text in requires(distribution) or ()]
    except PackageNotFoundError:
        return found
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed} (tested: {requirement.specifier})")
    return found


def warn_of_untested() -> None:
    """Warns in one line of packages whose release lies outside the bounds in pyproject.toml."""
    if releases := untested():
        logger.warning(
            f"modeling_moe was not tested with {', '.join(releases)}: install a release within these bounds, or test this "
            "one in a clone of the project by `bash scripts/test.sh --matrix NAME==VERSION`."
        )
