# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module draws the figure of a GPU check: forward and backward of every preset, by implementation."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .targets import select


NAMES = {"moe": "this package", "grouped_mm": "grouped_mm", "liger": "Liger", "dense": "dense products"}


def can_draw() -> bool:
    """Returns whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws the time of forward and backward relative to dense products, at the largest measured number of tokens.

    Args:
        rows: lines of results.
        path: path of the PNG file.

    Returns:
        Whether there was anything to draw.
    """
    cases = [
        row
        for row in select(rows, part="comparison", mode="forward_backward", routing="balanced")
        if row.get("ms", {}).get("dense")
    ]
    most = max((row["tokens"] for row in cases), default=0)
    cases = [row for row in cases if row["tokens"] == most]
    if not cases:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    shown = [name for name in NAMES if any(name in row["ms"] for row in cases)]
    for number, name in enumerate(shown):
        places = [place + (number - (len(shown) - 1) / 2) * 0.8 / len(shown) for place in range(len(cases))]
        heights = [row["ms"].get(name, 0.0) / row["ms"]["dense"] for row in cases]
        axes.bar(places, heights, 0.8 / len(shown), label=NAMES[name])
    axes.set_xticks(range(len(cases)), [row["preset"] for row in cases])
    axes.set_ylabel("time over dense products")
    axes.set_title(f"Forward and backward, {most:,} tokens")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return True
