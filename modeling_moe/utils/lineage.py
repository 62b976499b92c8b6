# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint came from: base model, license and language, carried from folder to folder up to the model card."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from .errors import UserError
from .locations import read_json


CONVERSION = "conversion.json"
FINETUNING = "finetuning.json"
# of a card's metadata
CARRIED = ("license", "license_name", "license_link", "language")


def hub_name(folder: str | Path) -> str | None:
    """The Hub name `owner/name` of a folder in the Hub's cache, `models--owner--name/snapshots/COMMIT`; None elsewhere."""
    for parent in [Path(folder).resolve(), *Path(folder).resolve().parents]:
        if parent.parent.name == "snapshots" and (match := re.fullmatch("models--(.+)", parent.parents[1].name)):
            return match[1].replace("--", "/", 1)
    return None


def card_metadata(folder: str | Path) -> dict[str, Any]:
    """License and language that the card in a folder gives in its metadata; empty without a card that can be read."""
    file = Path(folder) / "README.md"
    try:
        found = (metadata_load(file) or {}) if file.is_file() else {}
    except (ValueError, yaml.YAMLError):
        return {}  # somebody else's card is no part of the model: what it says is then not known
    return {name: found[name] for name in CARRIED if found.get(name) and _is_told(name, found[name])}


def _is_told(name: str, value: Any) -> bool:
    """Whether a value is of the type that a card's metadata have under that name; YAML can nest lists without end."""
    if isinstance(value, list) and name == "language":
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def recorded_lineage(folder: str | Path) -> dict[str, Any]:
    """What `conversion.json` in a folder says of the checkpoint's source; empty if it says nothing.

    Raises:
        UserError: if the file is damaged.
    """
    file = Path(folder) / CONVERSION
    recipe = read_json(file).get("recipe") if file.is_file() else None
    lineage = recipe.get("lineage") if isinstance(recipe, dict) else None
    lineage = lineage if isinstance(lineage, dict) else {}
    for name, value in lineage.items():
        if name not in ("base_model", *CARRIED) or not _is_told(name, value):
            raise UserError(
                f"{file} is damaged: its lineage has {name} {value!r:.100}, which no run wrote; remove it there"
            )
    return dict(lineage)


def lineage_of(folder: str | Path) -> dict[str, Any]:
    """What is known of a source, for the record of what is made from it.

    Args:
        folder: of the source.

    Returns:
        Those that are known of `base_model` (a Hub name), `license`, `license_name`, `license_link` and `language`, in
        JSON's types. The source's own card comes before what its `conversion.json` has carried on.

    Raises:
        UserError: if `conversion.json` is damaged.
    """
    lineage = recorded_lineage(folder) | card_metadata(folder)
    if (name := hub_name(folder)) is not None:
        lineage["base_model"] = name
    return lineage
