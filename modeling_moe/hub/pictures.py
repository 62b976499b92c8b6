# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the pictures of the routing that a card shows."""

from pathlib import Path


ASSETS = "assets"
# file that `modeling_moe.monitoring.page.card_pictures` writes -> alternative text
PICTURES = {
    "routing_load.png": "The share of the tokens that each expert of each layer receives",
    "routing_specialisation.png": "The experts of each layer that receive more or fewer tokens of a domain than of all text",
}


def card_pictures(folder: Path) -> list[str]:
    """Returns the names of the pictures of the routing that lie in a model's folder `assets`."""
    return [name for name in PICTURES if (folder / ASSETS / name).is_file()]
