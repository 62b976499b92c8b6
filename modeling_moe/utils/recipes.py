# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the files of configuration/ that the package brings, in a clone and in an installed wheel."""

from pathlib import Path


# a link to ../configuration in a clone, a folder in a wheel
CONFIGURATION = Path(__file__).parents[1] / "configuration"


def recipes() -> dict[str, Path]:
    """Returns the file of each recipe by name, such as `sft_lora`, in alphabetical order."""
    return {file.stem: file for file in sorted((CONFIGURATION / "recipes").glob("*.yaml"))}
