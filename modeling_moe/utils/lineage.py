# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Base model, license and language of a checkpoint are carried from folder to folder, up to the model card."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from .errors import UserError
from .json_files import read_json


CONVERSION = "conversion.json"
FINETUNING = "finetuning.json"
# entry of conversion.json with what a comparison of source and result measured
VERIFICATION = "verification"
# entries of a model card's metadata that a derived model inherits
CARRIED = ("license", "license_name", "license_link", "language")


def hub_name(folder: str | Path) -> str | None:
    """Returns the Hub name `owner/name` of a folder in the Hub's cache, or None for any other folder.

    The cache keeps a model in `models--OWNER--NAME/snapshots/COMMIT`.
    """
    for parent in [Path(folder).resolve(), *Path(folder).resolve().parents]:
        if parent.parent.name == "snapshots" and (match := re.fullmatch("models--(.+)", parent.parents[1].name)):
            return match[1].replace("--", "/", 1)
    return None


def card_metadata(folder: str | Path) -> dict[str, Any]:
    """Returns license and language from the metadata of the folder's model card; empty without a readable card."""
    file = Path(folder) / "README.md"
    try:
        found = (metadata_load(file) or {}) if file.is_file() else {}
    except (ValueError, yaml.YAMLError):
        return {}  # a damaged card does not make the model unusable
    return {name: found[name] for name in CARRIED if found.get(name) and _has_card_type(name, found[name])}


def _has_card_type(name: str, value: object) -> bool:
    """Returns whether a value is a text, or a list of texts for `language`; YAML could give any nested value."""
    if isinstance(value, list) and name == "language":
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def recorded_lineage(folder: str | Path) -> dict[str, Any]:
    """Returns the lineage that the folder's `conversion.json` records; empty if it records none.

    Raises:
        UserError: if the file is damaged.
    """
    file = Path(folder) / CONVERSION
    recipe = read_json(file).get("recipe") if file.is_file() else None
    lineage = recipe.get("lineage") if isinstance(recipe, dict) else None
    lineage = lineage if isinstance(lineage, dict) else {}
    for name, value in lineage.items():
        if name not in ("base_model", *CARRIED) or not _has_card_type(name, value):
            raise UserError(
                f"{file} is damaged: its lineage has {name} {value!r:.100}, which no run wrote; remove it there"
            )
    return dict(lineage)


def lineage_of(folder: str | Path) -> dict[str, Any]:
    """Returns the lineage of a source, to be recorded with a model that is made from it.

    Args:
        folder: folder of the source.

    Returns:
        The known ones of `base_model` (a Hub name), `license`, `license_name`, `license_link` and `language`, in JSON's
        types. The source's model card takes precedence over the lineage in the source's `conversion.json`.

    Raises:
        UserError: if `conversion.json` is damaged.
    """
    lineage = recorded_lineage(folder) | card_metadata(folder)
    if (name := hub_name(folder)) is not None:
        lineage["base_model"] = name
    return lineage
