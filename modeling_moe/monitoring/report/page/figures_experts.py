# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module draws what is seen of one layer at a time: co-activation, routing by position, and paths to the next layer.

The first drawing of each function shows all layers at once; one drawing for each layer follows.

# L sparse layers, E experts, P position bins
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path as Outline

from ..data import LayerTrace, ModelTrace
from .figures_layers import layer_names, ratio_limit, ratio_norm
from .style import (
    AMOUNTS,
    BLUE,
    HALF_WIDTH,
    INK,
    PAPER,
    RATIOS,
    WIDTH,
    Cells,
    Drawing,
    draw_scale,
    draw_side_scale,
    expert_names,
    heat_map,
    ticks,
    with_scale,
    with_side_scale,
)


# a layer's flows that are drawn; more make a grey carpet
FLOWS = 40
# width of an expert's bar; the distance of two layers is 1
BAR = 0.1
# inches of a heat map of experts x experts
SQUARE = 5.4


def together(layer: LayerTrace) -> np.ndarray:
    """Returns the co-activation (E, E) without the diagonal, which is no pair."""
    values = layer.co_activation.astype(float).copy()
    np.fill_diagonal(values, np.nan)
    return values


def most_together(models: Sequence[ModelTrace]) -> float:
    """Returns the largest co-activation of any pair, the end of the colour scale."""
    pairs = [together(layer) for model in models for layer in model.layers if layer.num_experts > 1]
    return max([1e-3, *(float(np.nanmax(values)) for values in pairs)])


def co_activation(model: ModelTrace, most: float, width: float = WIDTH) -> list[Drawing]:
    """Draws the share of tokens that use two experts, for all layers small and for each layer large."""
    norm = Normalize(0, 100 * most)
    count = len(model.layers)
    columns = 4 if width <= HALF_WIDTH else 6
    lines = math.ceil(count / columns)
    square = width / columns - 0.1
    figure = Figure(figsize=(width, 0.75 + lines * (square + 0.25)), layout="constrained")
    scale, panels = with_scale(figure, lines, columns, height=square)
    cells = []
    for axes, layer in zip(panels, model.layers, strict=False):
        values = 100 * together(layer)
        image = heat_map(axes, values, AMOUNTS, norm)
        axes.set(aspect="equal", anchor="W", xticks=[], yticks=[])
        axes.set_title(f"layer {layer.title}", size=8.5)
        names = expert_names(layer.num_experts)
        cells.append(Cells(axes, values, names, names, "% of the tokens use both"))
    for axes in panels[count:]:
        axes.set_axis_off()
    draw_scale(scale, image, "tokens that use both experts (%)")
    return [Drawing("all layers", figure, cells), *(_pairs(layer, norm) for layer in model.layers)]


def _pairs(layer: LayerTrace, norm: Normalize) -> Drawing:
    values = 100 * together(layer)
    figure, axes, scale = with_side_scale(SQUARE + 0.7, SQUARE)
    axes.set(title=f"Layer {layer.title}: experts chosen together", xlabel="expert")
    axes.set_ylabel("expert", rotation_mode="anchor")
    texts = None
    if layer.num_experts <= 10:
        texts = [["" if np.isnan(value) else f"{value:.3g}" for value in row] for row in values]
    image = heat_map(axes, values, AMOUNTS, norm, texts)
    names = list(map(str, range(layer.num_experts)))
    ticks(axes, "x", names, 16)
    ticks(axes, "y", names, 16)
    draw_side_scale(scale, image, "tokens that use both experts (%)")
    names = expert_names(layer.num_experts)
    return Drawing(f"layer {layer.title}", figure, [Cells(axes, values, names, names, "% of the tokens use both")])


def shares(load: np.ndarray) -> np.ndarray:
    """Returns each row (..., E) over the row's sum; NaN where a row is empty."""
    total = load.sum(axis=-1, keepdims=True).astype(float)
    return np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)


def bins(model: ModelTrace) -> list[str]:
    """Returns the positions of each bin as text, such as `4-7`."""
    edges = model.position_edges
    return [str(start) if end - start == 1 else f"{start}\u2013{end - 1}" for start, end in pairwise(edges)]


def position_ratios(layer: LayerTrace) -> np.ndarray:
    """Returns log2 (E, P) of each expert's share at a position over its share at all positions."""
    everywhere = shares(layer.position.sum(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(shares(layer.position) / everywhere).T


def position_shift(layer: LayerTrace) -> np.ndarray:
    """Returns the total variation distance (P,) between the experts' shares at a position and at all positions."""
    return abs(shares(layer.position) - shares(layer.position.sum(axis=0))).sum(axis=-1) / 2


def position(model: ModelTrace, most: float, width: float = WIDTH) -> list[Drawing]:
    """Draws how far the routing at each position is from that of all positions, then each layer's experts by position."""
    values = np.array([position_shift(layer) for layer in model.layers])
    names = bins(model)
    rows = len(model.layers)
    height = min(max(0.9, 0.28 * rows), 10)
    figure = Figure(figsize=(width, 1.4 + height), layout="constrained")
    scale, (axes,) = with_scale(figure, height=height)
    texts = [["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values] if values.size <= 200 else None
    image = heat_map(axes, values, AMOUNTS, Normalize(0, most), texts)
    ticks(axes, "y", layer_names(model), 32)
    ticks(axes, "x", names, 12)
    axes.set_xlabel("position of the token in the text")
    axes.set_ylabel("layer", rotation_mode="anchor")
    draw_scale(scale, image, "share of the load that is on other experts than over all positions (0 is none)")
    places = [f"position {text}" for text in names]
    layers = [f"layer {text}" for text in layer_names(model)]
    first = Drawing("all layers", figure, [Cells(axes, values, layers, places, "of the assignments")])
    limit = ratio_limit([position_ratios(layer) for layer in model.layers])
    return [first, *(_positions_of(layer, names, limit, width) for layer in model.layers)]


def _positions_of(layer: LayerTrace, names: Sequence[str], limit: float, width: float) -> Drawing:
    values = position_ratios(layer)
    figure, axes, scale = with_side_scale(width, min(max(2.6, 1.2 + 0.16 * len(values)), 8))
    image = heat_map(axes, np.clip(values, -limit, limit), RATIOS, ratio_norm(limit))
    ticks(axes, "y", list(map(str, range(layer.num_experts))), 32)
    ticks(axes, "x", names, 12)
    axes.set_xlabel("position of the token in the text")
    axes.set_ylabel("expert", rotation_mode="anchor")
    axes.set_title(f"Layer {layer.title}: log\u2082 of an expert's share at a position over its share everywhere")
    draw_side_scale(scale, image, "log\u2082", extend="both")
    places = [f"position {text}" for text in names]
    cells = Cells(axes, values, expert_names(layer.num_experts), places, "log\u2082 of the ratio")
    return Drawing(f"layer {layer.title}", figure, [cells])


def most_on_a_path(models: Sequence[ModelTrace]) -> float:
    """Returns the largest share of an expert's tokens that go to one expert, the end of the colour scale."""
    found = [np.nanmax(shares(counts), initial=0.01) for model in models for counts in model.paths]
    return float(max(found, default=0.01))


def paths(model: ModelTrace, most: float, width: float = WIDTH) -> list[Drawing]:
    """Draws the strongest flows of first choices through all layers, then one matrix for each pair of layers."""
    experts = max(layer.num_experts for layer in model.layers)
    height = min(max(3.2, 2.2 + 0.16 * experts), 7)
    figure = Figure(figsize=(max(width, 0.4 * len(model.layers)), height), layout="constrained")
    axes = figure.subplots()
    gap = min(0.05, 0.5 / experts)
    for place, counts in enumerate(model.paths):
        _flows(axes, place, shares(counts.reshape(1, -1)).reshape(counts.shape), gap)
    axes.set_yticks([])
    _nodes(axes, model, gap)
    axes.set_xticks(range(len(model.layers)), layer_names(model))
    axes.set(xlabel="layer", xlim=(-0.2, len(model.layers) - 0.8), ylim=(1 + gap * experts, -gap))
    axes.set_ylabel("experts", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    legend = [
        Patch(color=BLUE, alpha=0.25, label="tokens that go from one expert to the next"),
        Patch(color=BLUE, alpha=0.7, label="at least twice as many as by chance"),
    ]
    figure.legend(handles=legend, loc="outside upper left", ncols=1 if width <= HALF_WIDTH else 2)
    pairs = zip(model.layers, model.layers[1:], model.paths, strict=False)
    return [Drawing("all layers", figure), *(_path_matrix(*pair, most) for pair in pairs)]


def _bottoms(share: np.ndarray, gap: float) -> np.ndarray:
    """Returns where each expert's bar starts: the shares (E,) before it, and the gaps between them."""
    return np.cumsum(share) - share + gap * np.arange(len(share))


def _flows(axes: Axes, place: int, share: np.ndarray, gap: float) -> None:
    """Draws the strongest flows from layer `place` to the next as bands; share (E, E of the next layer) sums to 1."""
    if not np.isfinite(share).all():
        return
    start = _bottoms(share.sum(axis=1), gap)[:, None] + np.cumsum(share, axis=1) - share
    end = _bottoms(share.sum(axis=0), gap)[None, :] + np.cumsum(share, axis=0) - share
    strongest = np.argsort(share, axis=None, kind="stable")[::-1][:FLOWS]
    by_chance = share.sum(axis=1, keepdims=True) * share.sum(axis=0, keepdims=True)
    left, right, middle = place + BAR / 2, place + 1 - BAR / 2, place + 0.5
    codes = [Outline.MOVETO, *[Outline.CURVE4] * 3, Outline.LINETO, *[Outline.CURVE4] * 3, Outline.CLOSEPOLY]
    bands = {0.25: [], 0.7: []}
    for source, target in zip(*np.unravel_index(strongest, share.shape), strict=True):
        size, a, b = share[source, target], start[source, target], end[source, target]
        if size > 0:
            upper = [(left, a), (middle, a), (middle, b), (right, b)]
            lower = [(right, b + size), (middle, b + size), (middle, a + size), (left, a + size)]
            strong = size >= 2 * by_chance[source, target]
            bands[0.7 if strong else 0.25].append(Outline([*upper, *lower, (left, a)], codes))
    for alpha, outlines in bands.items():
        axes.add_collection(PathCollection(outlines, facecolors=BLUE, edgecolors=BLUE, alpha=alpha, linewidths=0.6))


def _nodes(axes: Axes, model: ModelTrace, gap: float) -> None:
    """Draws each expert as a bar as high as its share of the first choices; a dead expert has none."""
    for place, layer in enumerate(model.layers):
        counts = model.paths[place].sum(axis=1) if place < len(model.paths) else model.paths[-1].sum(axis=0)
        share = np.nan_to_num(shares(counts[None])[0])
        start = _bottoms(share, gap)
        axes.bar([place] * len(share), share, width=BAR, bottom=start, color=INK, linewidth=0)
        middles = start + share / 2
        if layer.num_experts <= 16 and len(model.layers) <= 12:
            for expert in np.nonzero(share >= 0.04)[0]:
                place_of_text = {"ha": "center", "va": "center_baseline", "size": 7, "color": PAPER}
                axes.text(place, middles[expert], str(expert), **place_of_text)
        elif place == 0:
            step = max(1, len(share) // 16)
            axes.set_yticks(middles[::step], list(map(str, range(0, len(share), step))))


def _path_matrix(layer: LayerTrace, following: LayerTrace, counts: np.ndarray, most: float) -> Drawing:
    values = 100 * shares(counts)
    label = f"layer {layer.title} \u2192 {following.title}"
    figure, axes, scale = with_side_scale(SQUARE + 0.7, SQUARE)
    axes.set(
        title=f"Where the tokens of an expert of layer {layer.title} go", xlabel=f"expert of layer {following.title}"
    )
    axes.set_ylabel(f"expert of layer {layer.title}", rotation_mode="anchor")
    texts = (
        [["" if np.isnan(value) else f"{value:.0f}" for value in row] for row in values]
        if counts.size <= 100
        else None
    )
    image = heat_map(axes, values, AMOUNTS, Normalize(0, 100 * most), texts)
    ticks(axes, "x", list(map(str, range(counts.shape[1]))), 16)
    ticks(axes, "y", list(map(str, range(counts.shape[0]))), 16)
    draw_side_scale(scale, image, "share of the expert's tokens (%)")
    rows = [f"expert {expert} of layer {layer.title}" for expert in range(counts.shape[0])]
    columns = [f"expert {expert} of layer {following.title}" for expert in range(counts.shape[1])]
    return Drawing(label, figure, [Cells(axes, values, rows, columns, "% of the expert's tokens")])
