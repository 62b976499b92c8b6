# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module draws the figures that a training run logged: the loss, and each figure of the routing by layer and step."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .style import AMOUNTS, BLUE, WIDTH, Cells, Drawing, heat_map, name, ticks


KEY = re.compile(r"routing/layer_(\d+)/(\w+)")
# logged name -> title; other figures follow under their logged names
TITLES = {
    "max_violation": "MaxVio (0 is balanced)",
    "marginal_entropy": "Marginal entropy (nats)",
    "token_entropy": "Token entropy (nats)",
    "dead_experts": "Dead experts (share)",
    "dropped_share": "Dropped assignments (share)",
    "mean_experts": "Experts per token",
    "gate_margin": "Gate margin",
}


def _number(value: Any) -> float | None:
    """Returns a finite number; None for anything else that a log may hold."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def logged(history: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[float, float]]]:
    """Returns {figure: {layer: {step: value}}} of the entries' keys `routing/layer_03/figure`, known figures first."""
    found: dict[str, dict[int, dict[float, float]]] = {figure: {} for figure in TITLES}
    for entry in history:
        step = _number(entry.get("step"))
        for key, value in entry.items():
            match, number = KEY.fullmatch(key), _number(value)
            if match is not None and number is not None and step is not None:
                found.setdefault(match[2], {}).setdefault(int(match[1]), {})[step] = number
    return {figure: layers for figure, layers in found.items() if layers}


def losses(history: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Returns {step: loss} of the entries that hold a training loss."""
    pairs = [(_number(entry.get("step")), _number(entry.get("loss"))) for entry in history]
    return {step: loss for step, loss in pairs if step is not None and loss is not None}


def history(entries: Sequence[dict[str, Any]], width: float = WIDTH) -> Drawing:
    """Draws the loss as a line, and each logged figure of the routing as a heat map of layer and step."""
    figures, loss = logged(entries), losses(entries)
    count = len(figures) + bool(loss)
    layers = max((len(of) for of in figures.values()), default=1)
    lines = math.ceil(count / 2)
    height = min(max(1.9, 1.0 + 0.12 * layers), 3.6)
    figure = Figure(figsize=(width, lines * height), layout="constrained")
    panels = iter(figure.subplots(lines, 2, squeeze=False).ravel())
    cells = []
    if loss:
        axes = next(panels)
        axes.plot(list(loss), list(loss.values()), color=BLUE, linewidth=1.6)
        axes.set(title="Loss (nats per token)", xlabel="step")
        axes.grid(axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    for key, by_layer in figures.items():
        axes, indices = next(panels), sorted(by_layer)
        steps = sorted(set().union(*by_layer.values()))
        values = np.array([[by_layer[index].get(step, np.nan) for step in steps] for index in indices])
        top = float(np.nanmax(values))
        image = heat_map(axes, values, AMOUNTS, Normalize(min(0.0, float(np.nanmin(values))), top if top > 0 else 1.0))
        axes.set(title=TITLES.get(key, name(key)), xlabel="step")
        axes.set_ylabel("layer", rotation_mode="anchor")
        ticks(axes, "y", list(map(str, indices)), 8)
        ticks(axes, "x", [f"{step:g}" for step in steps], 7)
        figure.colorbar(image, ax=axes, aspect=36, pad=0.02).outline.set_visible(False)
        rows, columns = [f"layer {index}" for index in indices], [f"step {step:g}" for step in steps]
        cells.append(Cells(axes, values, rows, columns, ""))
    for axes in panels:
        axes.set_axis_off()
    return Drawing("all figures", figure, cells)
