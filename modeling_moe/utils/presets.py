# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lists the model configurations that are shipped with the package."""

from pathlib import Path

from ..configuration_presets import preset_files


def presets() -> dict[str, Path]:
    """Returns the file of each shipped model configuration by its name, in alphabetical order."""
    return preset_files()
