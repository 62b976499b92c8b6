# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module draws what a training run logged: the loss, the router losses, and each figure of the routing by layer and step."""

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .style import AMOUNTS, BLUE, MUTED, ORANGE, WIDTH, Cells, Drawing, heat_map, name, ticks


LAYER_KEY = re.compile(r"routing/(.+)/(\w+)")
LOSS_KEY = re.compile(r"routing/(\w+)_loss")
# columns of a heat map; of more steps, neighbours are averaged, since a screen has no more pixels for them
MOST_COLUMNS = 400
# logged name -> title; other figures follow under their logged names
TITLES = {
    "max_violation": "MaxVio (0 is balanced)",
    "marginal_entropy": "Marginal entropy (nats)",
    "token_entropy": "Token entropy (nats)",
    "dead_experts": "Dead experts (share)",
    "dropped_share": "Dropped assignments (share)",
    "mean_experts": "Experts per token",
    "gate_margin": "Gate margin",
    "load_variation": "Deviation of the load over its mean",
    "empty_share": "Empty assignments (share)",
    "normalised_balance": "Load-balancing loss over K (1 is balanced)",
    "entropy_difference": "Marginal minus token entropy (nats)",
    "router_grad_norm": "Norm of the router's gradient",
}


def _number(value: Any) -> float | None:
    """Returns a finite number; None for anything else that a log may hold."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def logged(history: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[float, float]]]:
    """Returns {figure: {layer: {step: value}}} of the entries' keys `routing/layer_03/figure`, known figures first.

    The layer of this key is `3`. Where a decoder layer has several experts modules, the key holds the name of the module.
    """
    found: dict[str, dict[str, dict[float, float]]] = {figure: {} for figure in TITLES}
    for entry in history:
        step = _number(entry.get("step"))
        for key, value in entry.items():
            match, number = LAYER_KEY.fullmatch(key), _number(value)
            if match is not None and number is not None and step is not None:
                index = re.fullmatch(r"layer_(\d+)", match[1])
                layer = match[1] if index is None else str(int(index[1]))
                found.setdefault(match[2], {}).setdefault(layer, {})[step] = number
    return {figure: dict(sorted(layers.items(), key=_in_order)) for figure, layers in found.items() if layers}


def _in_order(layer: tuple[str, Any]) -> list[tuple[bool, int, str]]:
    """Returns a key that sorts names by the numbers in them."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", layer[0])
    ]


def router_losses(history: Sequence[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Returns {name: {step: value}} of the entries' keys `routing/balance_loss` and so on."""
    found: dict[str, dict[float, float]] = {}
    for entry in history:
        step = _number(entry.get("step"))
        for key, value in entry.items():
            match, number = LOSS_KEY.fullmatch(key), _number(value)
            if match is not None and number is not None and step is not None:
                found.setdefault(match[1].replace("_", " "), {})[step] = number
    return found


def losses(history: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Returns {step: loss} of the entries that hold a training loss."""
    pairs = [(_number(entry.get("step")), _number(entry.get("loss"))) for entry in history]
    return {step: loss for step, loss in pairs if step is not None and loss is not None}


def history(entries: Sequence[dict[str, Any]], width: float = WIDTH) -> Drawing:
    """Draws the losses as lines, and each logged figure of the routing as a heat map of layer and step."""
    figures = logged(entries)
    curves = [
        ("Loss (nats per token)", {"": losses(entries)}),
        ("Router losses, before their coefficients", router_losses(entries)),
    ]
    curves = [(title, lines) for title, lines in curves if any(lines.values())]
    layers = max((len(of) for of in figures.values()), default=1)
    rows = math.ceil((len(figures) + len(curves)) / 2)
    height = min(max(1.9, 1.0 + 0.12 * layers), 3.6)
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    panels = iter(figure.subplots(rows, 2, squeeze=False).ravel())
    for title, lines in curves:
        _curves(next(panels), title, lines)
    cells = [_heat_map(next(panels), key, by_layer) for key, by_layer in figures.items()]
    for axes in panels:
        axes.set_axis_off()
    return Drawing("all figures", figure, cells)


def _curves(axes: Axes, title: str, lines: dict[str, dict[float, float]]) -> None:
    """Draws {name: {step: value}} as lines; one line needs no name."""
    for place, (label, values) in enumerate(lines.items()):
        colour, dashes = ((BLUE, "-"), (ORANGE, "--"), (MUTED, ":"))[place % 3]
        axes.plot(list(values), list(values.values()), dashes, color=colour, linewidth=1.6, label=name(label))
    axes.set(title=title, xlabel="step")
    axes.grid(axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    if any(lines):
        axes.legend(loc="best")


def _heat_map(axes: Axes, key: str, by_layer: dict[str, dict[float, float]]) -> Cells:
    """Draws a figure {layer: {step: value}}."""
    steps = sorted(set().union(*by_layer.values()))
    values = np.array([[of.get(step, np.nan) for step in steps] for of in by_layer.values()])
    values, columns = _thinned(values, [f"{step:g}" if step < 1e5 else f"{step:.0f}" for step in steps])
    top = float(np.nanmax(values))
    image = heat_map(axes, values, AMOUNTS, Normalize(min(0.0, float(np.nanmin(values))), top if top > 0 else 1.0))
    axes.set(title=TITLES.get(key, name(key)), xlabel="step")
    axes.set_ylabel("layer", rotation_mode="anchor")
    ticks(axes, "y", [name(layer, 24) for layer in by_layer], 8)
    ticks(axes, "x", [column.split("\u2013")[0] for column in columns], 7)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axes, aspect=36, pad=0.02).outline.set_visible(False)
    rows = [f"layer {name(layer)}" for layer in by_layer]
    return Cells(axes, values, rows, [f"step {column}" for column in columns], "")


def _thinned(values: np.ndarray, steps: list[str]) -> tuple[np.ndarray, list[str]]:
    """Averages neighbouring columns of values (L, S), without NaN, until at most `MOST_COLUMNS` are left.

    Returns:
        The values and the names of their columns, such as `10` or `10\u201340`.
    """
    size = math.ceil(len(steps) / MOST_COLUMNS)
    if size == 1:
        return values, steps
    groups = [slice(start, start + size) for start in range(0, len(steps), size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a layer may lack all values of a group
        means = np.stack([np.nanmean(values[:, group], axis=1) for group in groups], axis=1)
    return means, [f"{steps[group][0]}\u2013{steps[group][-1]}" for group in groups]
