# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module takes the pictures of the routing from a report to the card of the model."""

import shutil
from pathlib import Path

from ..utils.errors import UserError


ASSETS = "assets"
# file that `moe report` writes -> what the picture shows
PICTURES = {
    "routing_load.png": "The load of each expert in each layer over the mean load of the layer: 1 is balanced",
    "routing_specialisation.png": "The share of each expert in a domain over its mean share, by layer; a dot marks what is "
    "beyond chance",
}


def pictures_in(folder: Path) -> list[str]:
    """Returns the names of the pictures of the routing that lie in a model's folder `assets`."""
    return [name for name in PICTURES if (folder / ASSETS / name).is_file()]


def report_pictures(report: Path) -> dict[str, Path]:
    """Returns the pictures for a card in the folder of a report: names to files.

    Raises:
        UserError: if there is none.
    """
    found = {name: report / name for name in PICTURES if (report / name).is_file()}
    if not found:
        raise UserError(
            f"report {report} holds no {next(iter(PICTURES))}: make it with moe report --output_dir {report}"
        )
    return found


def take_pictures(report: str | Path, folder: str | Path) -> list[Path]:
    """Copies the pictures of the routing from a report's folder to where the card of a model shows them.

    Args:
        report: folder that `moe report --output_dir` wrote.
        folder: folder of a model or adapter.

    Returns:
        The files in the model's folder.

    Raises:
        UserError: if the report has no pictures.
    """
    pictures, assets = report_pictures(Path(report)), Path(folder) / ASSETS
    assets.mkdir(exist_ok=True)
    return [Path(shutil.copyfile(file, assets / name)) for name, file in pictures.items()]
