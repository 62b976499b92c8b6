# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module puts the report's pictures in order: each section has a title, one sentence, and the drawings of each model."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data import ModelTrace, RoutingReport
from . import figures_experts, figures_history, figures_layers
from .style import HALF_WIDTH, WIDTH, Drawing


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        key: name of the section in addresses and of the PNG file.
        title: heading.
        sentence: what is seen, and what would be wrong.
        groups: the drawings of each model, of equal labels where possible; empty if there is nothing to draw.
        detail: the sentence for the drawings after the first, those of single layers; empty if `sentence` fits them.
    """

    key: str
    title: str
    sentence: str
    groups: list[list[Drawing]]
    detail: str = ""

    def longest(self) -> list[Drawing]:
        """Returns the drawings of the model that has most, whose labels the page offers."""
        return max(self.groups, key=len, default=[])


LOAD = (
    "Each cell is an expert's load over the mean load of the layer (1\u00d7 is balanced, a cross marks an expert without a "
    "token); a row with one dark orange cell among purple ones is a layer that has collapsed onto few experts."
)
SPECIALISATION = (
    "Orange experts take more of a domain than of the domains on average, purple ones less, and a dot marks a difference "
    "beyond chance; dark cells without dots are noise, and a pale picture after long training means that experts do not specialise."
)
ONE_DOMAIN = "Specialisation compares domains, and this report has only one: give --data at least two."
ENTROPY = (
    "A healthy layer keeps the marginal entropy near the dotted line (all experts in use) and the token entropy well "
    "below it (a clear choice for each token); a marginal entropy far below the line is collapse, and one equal to the token "
    "entropy means that the router does not look at the token."
)
NO_ENTROPY = "The entropies need the router's probabilities, which could not be had from this model."
CO_ACTIVATION = (
    "Bright pairs of experts are chosen together for many tokens; a few bright pairs in a dark square mean that the "
    "pair works as one larger expert and wastes choices."
)
ONE_EXPERT = "Co-activation needs at least two experts for each token, and this model chooses one."
PATHS = (
    f"Bands are the {figures_experts.FLOWS} strongest ways from a token's first expert in one layer to its first expert in the "
    "next, and each expert is a bar as high as its share of the tokens; bands that all end in one tall bar show a layer that one "
    "expert rules."
)
PATHS_OF_LAYER = (
    "Each row shares out the tokens of one expert among the first experts of the next layer; a column that is bright in all "
    "rows is an expert that takes tokens wherever they come from."
)
ONE_LAYER = "Paths need at least two sparse layers."
POSITION = (
    "Each cell says how far the choice of experts at a position is from the choice over all positions; bright cells beyond "
    "the first positions mean that the router looks at where a token stands rather than at what it is."
)
POSITION_OF_LAYER = (
    "Orange experts take more of the load at a position than at all positions, purple ones less; an expert that is orange at "
    "all late positions follows the position instead of the token."
)
CHANGES = (
    "Cells show the share of the load that moved to other experts from the first to the second model, bars the share of "
    "tokens with another set of experts; a bright layer without a better loss means that training only shuffled its experts."
)
HISTORY = (
    "Each heat map has a row for each layer and a column for each logged step; MaxVio or dead experts that brighten to the "
    "right, or a marginal entropy that darkens, are a collapse under way (training counts the choices before capacity drops any)."
)


def sections(report: RoutingReport) -> list[Section]:
    """Returns the sections with pictures, in reading order; the figures are not drawn yet."""
    found: list[Section] = []
    models = report.models
    width = WIDTH if len(models) < 2 else HALF_WIDTH
    if models:
        found = [
            _load(models, width),
            _specialisation(models, width),
            _entropy(models, width),
            _co_activation(models, width),
            _paths(models, width),
            _position(models, width),
        ]
    if report.changes is not None and report.changes.layers:
        drawing = figures_layers.changes(models[0], report.changes)
        found.insert(0, Section("changes", "What moved", CHANGES, [[drawing]]))
    if report.history is not None:
        found.append(_history(report))
    return found


def _on_one_scale(models: list[ModelTrace]) -> list[list[ModelTrace]]:
    """Returns for each model those whose colours share its scale: all of them, or it alone if the numbers of experts differ.

    An expert of few takes larger shares than one of many, whose differences could not be seen on the scale of the few.
    """
    experts = [{layer.num_experts for layer in model.layers} for model in models]
    return [models if all(other == experts[0] for other in experts) else [model] for model in models]


def _load(models: list[ModelTrace], width: float) -> Section:
    most = figures_layers.largest_violation(models)
    return Section(
        "load", "Expert load by layer", LOAD, [[figures_layers.load(model, most, width)] for model in models]
    )


def _specialisation(models: list[ModelTrace], width: float) -> Section:
    title = "Specialisation by domain"
    if len(models[0].domains) < 2:
        return Section("specialisation", title, ONE_DOMAIN, [])
    limits = [
        figures_layers.ratio_limit([layer.specialisation for model in group for layer in model.layers])
        for group in _on_one_scale(models)
    ]
    drawings = [[figures_layers.specialisation(*pair, width)] for pair in zip(models, limits, strict=True)]
    return Section("specialisation", title, SPECIALISATION, drawings)


def _entropy(models: list[ModelTrace], width: float) -> Section:
    title = "Entropy by depth"
    if all(layer.token_entropy is None for model in models for layer in model.layers):
        return Section("entropy", title, NO_ENTROPY, [])
    top = float(np.log(max(layer.num_experts for model in models for layer in model.layers))) or 1.0
    return Section("entropy", title, ENTROPY, [[figures_layers.entropy(model, top, width)] for model in models])


def _co_activation(models: list[ModelTrace], width: float) -> Section:
    title = "Co-activation"
    if all(layer.top_k < 2 or layer.num_experts < 2 for model in models for layer in model.layers):
        return Section("co_activation", title, ONE_EXPERT, [])
    scales = [figures_experts.most_together(group) for group in _on_one_scale(models)]
    drawings = [figures_experts.co_activation(*pair, width) for pair in zip(models, scales, strict=True)]
    return Section("co_activation", title, CO_ACTIVATION, drawings)


def _paths(models: list[ModelTrace], width: float) -> Section:
    title = "Paths from layer to layer"
    drawn = all(len(model.layers) > 1 for model in models)
    scales = [figures_experts.most_on_a_path(group) for group in _on_one_scale(models)]
    pairs = zip(models, scales, strict=True) if drawn else ()
    drawings = [figures_experts.paths(*pair, width) for pair in pairs]
    return Section("paths", title, PATHS if drawn else ONE_LAYER, drawings, PATHS_OF_LAYER)


def _position(models: list[ModelTrace], width: float) -> Section:
    shifts = [figures_experts.position_shift(layer) for model in models for layer in model.layers]
    most = max([0.05, *(float(np.nanmax(shift, initial=0.0)) for shift in shifts)])
    drawings = [figures_experts.position(model, most, width) for model in models]
    return Section("position", "Routing by position", POSITION, drawings, POSITION_OF_LAYER)


def _history(report: RoutingReport) -> Section:
    title, entries = "History of the training run", report.history or []
    drawn = figures_history.logged, figures_history.losses, figures_history.router_losses
    if not any(of(entries) for of in drawn):
        return Section("history", title, "The log holds no loss and no figure of the routing.", [])
    return Section("history", title, HISTORY, [[figures_history.history(entries)]])


# pictures of a model card: file name -> drawing of a model
CARD: dict[str, Callable[[ModelTrace], Drawing]] = {
    "routing_load.png": lambda model: figures_layers.load(model, figures_layers.largest_violation([model])),
    "routing_specialisation.png": lambda model: figures_layers.specialisation(
        model, figures_layers.ratio_limit([layer.specialisation for layer in model.layers])
    ),
}
