# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module draws what is seen of all layers at once: load, entropy, specialisation by domain, and what moved.

# L sparse layers, D domains, E experts
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from ..data import LayerTrace, ModelChanges, ModelTrace
from .style import (
    AMOUNTS,
    BLUE,
    HALF_WIDTH,
    MUTED,
    ORANGE,
    RATIOS,
    WIDTH,
    Cells,
    Drawing,
    colour_map,
    draw_scale,
    expert_names,
    heat_map,
    name,
    ticks,
    with_scale,
)


# more cells than these stay without numbers
CELLS_WITH_TEXT = 160
# inches of the narrowest cell in which a number is readable
NARROWEST_WITH_TEXT = 0.36
FRACTIONS = ["\u215b", "\u00bc", "\u00bd", "1", "2", "4", "8"]


def layer_names(model: ModelTrace) -> list[str]:
    """Returns the index of each sparse layer as text."""
    return [layer.title for layer in model.layers]


def wide(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns rows of different lengths as one array; NaN fills the shorter rows."""
    result = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in enumerate(rows):
        result[row, : len(values)] = values
    return result


def load_over_mean(layer: LayerTrace) -> np.ndarray:
    """Returns each expert's load over the mean load (E,); 1 is balanced; NaN if the layer got no token."""
    load = layer.load.sum(axis=0).astype(float)
    return load / load.mean() if load.any() else np.full(len(load), np.nan)


def ratio_norm(most: float) -> TwoSlopeNorm:
    """Returns a scale of log2 ratios that is neutral at 0."""
    return TwoSlopeNorm(0, -most, most)


def _height(rows: int, columns: int) -> float:
    """Returns inches for a heat map: few experts get square-like cells, and many layers get thin rows."""
    return min(max(0.3 if columns <= 16 else 0.22, 3.2 / max(rows, 1)) * rows, 0.42 * max(rows, 3), 11)


def largest_violation(models: Sequence[ModelTrace]) -> float:
    """Returns the end of the axis for MaxVio: the largest of all layers, and at least 1."""
    return max([1.0, *(layer.max_violation for model in models for layer in model.layers)])


def load(model: ModelTrace, most: float, width: float = WIDTH) -> Drawing:
    """Draws a heat map of each expert's load over the mean of its layer, and MaxVio as bars beside it, from 0 to `most`."""
    values = wide([load_over_mean(layer) for layer in model.layers])
    rows, experts = values.shape
    height = _height(rows, experts)
    figure = Figure(figsize=(width, 1.2 + height), layout="constrained")
    scale, (main, side) = with_scale(figure, columns=2, height=height, width_ratios=(5, 1))
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log2(values), -3, 3)
    numbers = values.size <= CELLS_WITH_TEXT and 5 * width / 6 / experts >= NARROWEST_WITH_TEXT
    image = heat_map(main, logs, RATIOS, ratio_norm(3), [[_load_text(v, numbers) for v in row] for row in values])
    bar = draw_scale(scale, image, "load over the mean load of the layer")
    bar.set_ticks(range(-3, 4), labels=[f"{text}\u00d7" for text in FRACTIONS])
    ticks(main, "y", layer_names(model), 32)
    main.set_ylabel("layer", rotation_mode="anchor")
    ticks(main, "x", list(map(str, range(experts))), 16)
    main.set_xlabel("expert")
    side.barh(range(rows), [layer.max_violation for layer in model.layers], height=0.6, color=BLUE)
    side.set(ylim=main.get_ylim(), yticks=[], xlim=(0, 1.05 * most), xlabel="0 is balanced")
    side.set_title("MaxVio", size=8.5)
    side.spines[["top", "right"]].set_visible(False)
    cells = Cells(main, values, _rows(model), expert_names(experts), "\u00d7 the mean load")
    return Drawing("all layers", figure, [cells])


def _load_text(value: float, numbers: bool) -> str:
    """Returns a cross for an expert without a token, and else the number if there is space for numbers."""
    if value == 0:
        return "\u00d7"
    return f"{value:.2g}" if numbers and np.isfinite(value) else ""


def _rows(model: ModelTrace) -> list[str]:
    return [f"layer {text}" for text in layer_names(model)]


def ratio_limit(values: Sequence[np.ndarray]) -> float:
    """Returns the largest absolute log2 ratio of all values, within 1 and 4."""
    finite = [abs(array[np.isfinite(array)]).max(initial=0) for array in values]
    return float(min(max([1.0, *finite]), 4))


def specialisation(model: ModelTrace, limit: float, width: float = WIDTH) -> Drawing:
    """Draws, for each domain, log2 of each expert's share of the domain over its mean share; significant cells get a dot."""
    experts = max(layer.num_experts for layer in model.layers)
    columns = 1 if experts > 16 else min(3 if width > HALF_WIDTH else 2, len(model.domains))
    lines = math.ceil(len(model.domains) / columns)
    height = min(_height(len(model.layers), experts), 6)
    figure = Figure(figsize=(width, 0.9 + lines * (height + 0.55)), layout="constrained")
    scale, panels = with_scale(figure, lines, columns, height=height)
    cells = []
    for domain, axes in enumerate(panels):
        if domain >= len(model.domains):
            axes.set_axis_off()
            continue
        values = wide([layer.specialisation[domain] for layer in model.layers])
        marked = wide([layer.significant[domain].astype(float) for layer in model.layers]) == 1
        _domain_panel(axes, values, marked, limit, width / columns)
        axes.set_title(name(model.domains[domain], int(9 * width / columns)))
        ticks(axes, "x", list(map(str, range(experts))), 16)
        ticks(axes, "y", layer_names(model), 16)
        if domain % columns == 0:
            axes.set_ylabel("layer", rotation_mode="anchor")
        if domain + columns >= len(model.domains):
            axes.set_xlabel("expert")
        cells.append(Cells(axes, values, _rows(model), expert_names(experts), "log\u2082 of the ratio"))
    label = "log\u2082 of the expert's share of the domain over its mean share (\u2022 beyond chance)"
    draw_scale(scale, ScalarMappable(ratio_norm(limit), colour_map(RATIOS)), label, extend="both")
    return Drawing("all layers", figure, cells)


def _domain_panel(axes: Axes, values: np.ndarray, marked: np.ndarray, limit: float, width: float) -> None:
    """Draws one domain; values (L, E) beyond the limit get the colour of the limit."""
    shown = np.clip(values, -limit, limit)
    if values.size <= CELLS_WITH_TEXT and width / values.shape[1] >= 1.25 * NARROWEST_WITH_TEXT:
        texts = [
            [_ratio_text(value, dot) for value, dot in zip(*pair, strict=True)]
            for pair in zip(values, marked, strict=True)
        ]
        heat_map(axes, shown, RATIOS, ratio_norm(limit), texts)
        return
    heat_map(axes, shown, RATIOS, ratio_norm(limit))
    for colour, of in (("white", abs(shown) > 0.62 * limit), ("black", abs(shown) <= 0.62 * limit)):
        row, column = np.nonzero(marked & of)
        axes.scatter(column, row, s=4, color=colour, linewidths=0, rasterized=True)


def _ratio_text(value: float, marked: bool) -> str:
    if np.isnan(value):
        return ""
    text = "\u2212\u221e" if np.isneginf(value) else f"{value:+.1f}".replace("-", "\u2212")
    return ("0" if text[1:] == "0.0" else text) + ("\u2022" if marked else "")


def entropy(model: ModelTrace, top: float, width: float = WIDTH) -> Drawing:
    """Draws the token entropy and the marginal entropy over depth, with the largest possible entropy above them."""
    figure = Figure(figsize=(width, 3.1), layout="constrained")
    axes = figure.subplots()
    place = range(len(model.layers))
    limits = [math.log(layer.num_experts) for layer in model.layers]
    axes.plot(place, limits, ":", color=MUTED, label="log E, the most", linewidth=1.4)
    for label, field, mark, colour in (
        ("marginal entropy: of all tokens together", "marginal_entropy", "s--", ORANGE),
        ("token entropy: of one token, on average", "token_entropy", "o-", BLUE),
    ):
        values = [getattr(layer, field) for layer in model.layers]
        line = [np.nan if value is None else value for value in values]
        axes.plot(place, line, mark, color=colour, label=label, linewidth=1.6, markersize=4.5)
    ticks(axes, "x", layer_names(model), 16 if width <= HALF_WIDTH else 32)
    axes.set_xlabel("layer")
    axes.set_ylabel("entropy (nats)", rotation_mode="anchor")
    axes.set_ylim(0, top * 1.05)
    axes.grid(axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=1 if width <= HALF_WIDTH else 3)
    return Drawing("all layers", figure)


def changes(model: ModelTrace, moved: ModelChanges, width: float = WIDTH) -> Drawing:
    """Draws how far the load of each layer and domain moved, and the share of tokens with other experts."""
    values = np.array([layer.load_shift for layer in moved.layers])
    rows, domains = values.shape
    height = _height(rows, domains)
    figure = Figure(figsize=(width, 1.4 + height), layout="constrained")
    scale, (main, side) = with_scale(figure, columns=2, height=height, width_ratios=(3, 2))
    texts = [[f"{value:.2f}" for value in row] for row in values] if values.size <= CELLS_WITH_TEXT else None
    image = heat_map(main, values, AMOUNTS, Normalize(0, max(0.1, values.max())), texts)
    draw_scale(scale, image, "share of the load that moved to other experts")
    layers = [layer.title for layer in moved.layers]
    ticks(main, "y", layers, 32)
    main.set_ylabel("layer", rotation_mode="anchor")
    shown = [name(domain, 16) for domain in model.domains]
    ticks(main, "x", shown, 16)
    if sum(map(len, shown)) > 7 * width:
        main.tick_params("x", rotation=35)
        for label in main.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    main.set_xlabel("domain")
    share = [np.nan if layer.changed_tokens is None else 100 * layer.changed_tokens for layer in moved.layers]
    if np.isfinite(share).any():
        side.barh(range(rows), share, height=0.6, color=ORANGE)
        side.set(ylim=main.get_ylim(), yticks=[], xlim=(0, 100), xlabel="% of all tokens")
        side.set_title("tokens with another set of experts", size=8.5)
        side.spines[["top", "right"]].set_visible(False)
    else:
        side.set_axis_off()
    names = [f"layer {layer}" for layer in layers]
    return Drawing("all layers", figure, [Cells(main, values, names, shown, "of the load")])
