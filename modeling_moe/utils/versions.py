# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package warns at import of releases of other packages that it was not tested with."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from transformers.utils import logging


logger = logging.get_logger(__name__)


def untested(distribution: str = "modeling-moe") -> list[str]:
    """This lists what is installed outside the bounds that an installed distribution gives, its extras left out.

    Args:
        distribution: a name that pip knows; one that is not installed has no bounds.

    Returns:
        A text such as `"transformers 5.99.0 (tested: >=5.17,<5.25)"` for each package.
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
    """This warns, in one line, of packages whose releases lie outside the bounds in pyproject.toml."""
    if releases := untested():
        logger.warning(
            f"modeling_moe was not tested with {', '.join(releases)}: install a release within these bounds, or test this "
            "one in a clone of the project by `bash scripts/test.sh --matrix NAME==VERSION`."
        )
