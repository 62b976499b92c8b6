# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says which cures prevent collapse, as Markdown tables and as a phase picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .byte_models import Trained
from .collapse import COLLAPSED, NO_CURE, Cell, CollapseResult
from .files import markdown_table
from .intervals import Difference, against, holm


# a claim needs an adjusted p-value below this
ALPHA = 0.05


@dataclass(frozen=True)
class Outcome:
    """Holds what happened in one cell.

    Attributes:
        starved: share of experts with less than a tenth of the mean load, mean over seeds.
        collapsed: number of seeds whose run collapsed.
        seeds: number of seeds.
        loss: held-out loss in nats per token, mean over seeds.
        difference: held-out loss minus the loss without cure at the learning rate; None without cure.
        p_adjusted: the difference's p-value, adjusted by Holm for the cells of the learning rate; None without cure.
    """

    starved: float
    collapsed: int
    seeds: int
    loss: float
    difference: Difference | None
    p_adjusted: float | None

    @property
    def real(self) -> bool:
        """Whether the difference from the loss without cure is real."""
        return self.p_adjusted is not None and self.p_adjusted < ALPHA

    @property
    def text(self) -> str:
        """The starved share, the collapsed seeds, and the difference of the loss, with a star if it is real."""
        said = f"{self.starved:.0%} ({self.collapsed}/{self.seeds})"
        if self.difference is None:
            return f"{said} {self.loss:.3f}"
        return f"{said} {self.difference.mean:+.3f}{'*' if self.real else ''}"


def has_collapsed(run: Trained) -> bool:
    """Whether a quarter of the experts, or more, has less than a tenth of the mean load on held-out text."""
    return run.starved_share >= COLLAPSED


def outcomes(result: CollapseResult) -> dict[Cell, Outcome]:
    """Compares each cell with the model without cure at the cell's learning rate.

    The deviation of the losses is shared by all cells of a learning rate.
    """
    found = {}
    for rate in result.learning_rates:
        cells = [cell for cell in result.runs if cell.learning_rate == rate]
        none = Cell(NO_CURE, 0.0, rate)
        differences: dict[Cell, Difference] = {}
        if len(cells) > 1:
            losses = {cell: [run.held_out_loss for run in result.runs[cell]] for cell in cells}
            differences = against(losses, none)
        adjusted = dict(zip(differences, holm([item.p_value for item in differences.values()]), strict=True))
        for cell in cells:
            runs = result.runs[cell]
            found[cell] = Outcome(
                starved=statistics.fmean(run.starved_share for run in runs),
                collapsed=sum(map(has_collapsed, runs)),
                seeds=len(runs),
                loss=statistics.fmean(run.held_out_loss for run in runs),
                difference=differences.get(cell),
                p_adjusted=adjusted.get(cell),
            )
    return found


def verdicts(result: CollapseResult) -> list[list[str]]:
    """Returns for each cure and learning rate the coefficients with which no seed collapsed."""
    found = outcomes(result)
    rows = []
    for cure in result.cures:
        row = [cure.name, f"`{'`, `'.join(cure.varied)}`"]
        for rate in result.learning_rates:
            good = [c for c in cure.coefficients if found[Cell(cure.name, c, rate)].collapsed == 0]
            row.append("all" if len(good) == len(cure.coefficients) else ", ".join(f"{c:g}" for c in good) or "none")
        rows.append([*row, cure.source])
    return rows


def markdown(result: CollapseResult) -> str:
    """Returns the verdicts, and what happened in each cell, in GitHub Markdown."""
    found, rates = outcomes(result), result.learning_rates
    rate_columns = [f"rate {rate:g}" for rate in rates]
    first = markdown_table(["cure", "field", *rate_columns, "source"], 2 + len(rates) + 1, verdicts(result))
    rows = [[NO_CURE, "", *(found[Cell(NO_CURE, 0.0, rate)].text for rate in rates)]]
    for cure in result.cures:
        for coefficient in cure.coefficients:
            cells = [found[Cell(cure.name, coefficient, rate)].text for rate in rates]
            rows.append([cure.name, f"{coefficient:g}", *cells])
    return f"{first}\n{markdown_table(['cure', 'coefficient', *rate_columns], 1, rows)}"


def plot_phases(path: str, result: CollapseResult) -> None:
    """Draws a panel for each cure: coefficients from left to right, learning rates from bottom to top.

    The colour shows the mean share of starved experts; the text in a cell shows the number of collapsed seeds and the
    loss minus the loss without cure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    found, rates = outcomes(result), result.learning_rates
    grids: list[tuple[str, Sequence[float]]] = [(NO_CURE, [0.0])]
    grids += [(cure.name, cure.coefficients) for cure in result.cures]
    columns = min(4, len(grids))
    rows = math.ceil(len(grids) / columns)
    figure = Figure(figsize=(3.6 * columns, 0.9 + rows * (0.9 + 0.45 * len(rates))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    shades = ScalarMappable(Normalize(0.0, 0.75), "Reds")
    for panel, (name, coefficients) in zip(panels, grids, strict=False):
        cells = [[found[Cell(name, coefficient, rate)] for coefficient in coefficients] for rate in rates]
        shares = [[cell.starved for cell in row] for row in cells]
        panel.imshow(shares, cmap=shades.cmap, norm=shades.norm, aspect="auto", origin="lower")
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                loss = f"{cell.loss:.2f}" if cell.difference is None else f"{cell.difference.mean:+.2f}"
                color = "white" if cell.starved > 0.45 else "black"
                said = f"{cell.collapsed}/{cell.seeds}\n{loss}"
                panel.text(x, y, said, ha="center", va="center", fontsize=7, color=color)
        panel.set_title(name, fontsize=9)
        panel.set_xticks(range(len(coefficients)), ["-" if name == NO_CURE else f"{c:g}" for c in coefficients])
        panel.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        panel.tick_params(labelsize=7)
    for panel in panels[len(grids) :]:
        panel.set_axis_off()
    figure.supylabel("learning rate", fontsize=9)
    figure.supxlabel(
        "coefficient; in each cell: collapsed seeds, held-out loss minus the loss without cure", fontsize=9
    )
    figure.colorbar(shades, ax=panels.tolist(), label="share of starved experts", shrink=0.6)
    figure.savefig(path, dpi=110, format="png")
