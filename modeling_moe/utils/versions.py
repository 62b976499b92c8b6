# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The releases of other packages that this one was tested with, as its own metadata names them."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from transformers.utils import logging


logger = logging.get_logger(__name__)


def untested(distribution: str = "modeling-moe") -> list[str]:
    """Requirements of an installed distribution that what is installed beside it does not meet.

    Args:
        distribution: a name that pip knows; one that is not installed has no requirements.

    Returns:
        A text such as `"transformers 5.99.0 (tested: >=5.17,<5.25)"` for each; extras are left out.
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
    """Warns, in one line, if a package that this one builds on is of a release that it was not tested with."""
    if releases := untested():
        logger.warning(
            f"modeling_moe was not tested with {', '.join(releases)}: install a tested release, or run "
            "`bash scripts/test.sh --matrix newest` to see whether this one works."
        )
