# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says which cures prevent collapse, as Markdown tables and as a phase picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .byte_models import Trained
from .collapse import COLLAPSED, NO_CURE, Cell, CollapseResult
from .files import markdown_table
from .intervals import against, holm


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
        other_loss: whether the loss really differs from the loss without cure.
        other_share: whether the starved share really differs from the share without cure.
    """

    starved: float
    collapsed: int
    seeds: int
    loss: float
    difference: float | None
    other_loss: bool
    other_share: bool

    @property
    def text(self) -> str:
        """The starved share, the collapsed seeds, and the difference of the loss; stars mark real differences."""
        said = f"{self.starved:.0%}{'*' * self.other_share} ({self.collapsed}/{self.seeds})"
        if self.difference is None:
            return f"{said} {self.loss:.3f}"
        return f"{said} {self.difference:+.3f}{'*' * self.other_loss}"


def has_collapsed(run: Trained) -> bool:
    """Whether a quarter of the experts, or more, has less than a tenth of the mean load on held-out text."""
    return run.starved_share >= COLLAPSED


def outcomes(result: CollapseResult) -> dict[Cell, Outcome]:
    """Compares each cell with the model without cure at the cell's learning rate."""
    found = {}
    for rate in result.learning_rates:
        runs = {cell: own for cell, own in result.runs.items() if cell.learning_rate == rate}
        none = Cell(NO_CURE, 0.0, rate)
        loss = statistics.fmean(run.held_out_loss for run in runs[none])
        losses, shares = (real_differences(runs, none, name) for name in ("held_out_loss", "starved_share"))
        for cell, own in runs.items():
            own_loss = statistics.fmean(run.held_out_loss for run in own)
            found[cell] = Outcome(
                starved=statistics.fmean(run.starved_share for run in own),
                collapsed=sum(map(has_collapsed, own)),
                seeds=len(own),
                loss=own_loss,
                difference=None if cell == none else own_loss - loss,
                other_loss=cell in losses,
                other_share=cell in shares,
            )
    return found


def real_differences(runs: dict[Cell, list[Trained]], none: Cell, name: str) -> set[Cell]:
    """Returns the cells in which a measured value really differs from the value without cure.

    The values are paired by seed, all cells share one deviation, and Holm corrects for the number of cells.
    """
    if len(runs) < 2:
        return set()
    found = against({cell: [getattr(run, name) for run in own] for cell, own in runs.items()}, none)
    adjusted = holm([difference.p_value for difference in found.values()])
    return {cell for cell, p_value in zip(found, adjusted, strict=True) if p_value < ALPHA}


def sensitivity(result: CollapseResult) -> list[str]:
    """Returns for each learning rate a sentence that says which differences from the model without cure are seen."""
    sentences = []
    for rate in result.learning_rates:
        runs = {cell: own for cell, own in result.runs.items() if cell.learning_rate == rate}
        if len(runs) < 2:
            continue
        none, level = Cell(NO_CURE, 0.0, rate), 1 - ALPHA / (len(runs) - 1)
        halves = []
        for name in ("held_out_loss", "starved_share"):
            values = {cell: [getattr(run, name) for run in own] for cell, own in runs.items()}
            # all cells have one deviation, so that all intervals have one width
            one = next(iter(against(values, none, level).values()))
            halves.append(one.high - one.mean)
        sentences.append(
            f"At rate {rate:g} a difference of {halves[0]:.3f} nats, or of {halves[1]:.0%} of the experts, always gets a star."
        )
    return sentences


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
    """Returns the verdicts, what happened in each cell, and how small a difference is seen, in GitHub Markdown."""
    found, rates = outcomes(result), result.learning_rates
    rate_columns = [f"rate {rate:g}" for rate in rates]
    first = markdown_table(["cure", "field", *rate_columns, "source"], 2 + len(rates) + 1, verdicts(result))
    rows = [[NO_CURE, "", *(found[Cell(NO_CURE, 0.0, rate)].text for rate in rates)]]
    for cure in result.cures:
        for coefficient in cure.coefficients:
            cells = [found[Cell(cure.name, coefficient, rate)].text for rate in rates]
            rows.append([cure.name, f"{coefficient:g}", *cells])
    second = markdown_table(["cure", "coefficient", *rate_columns], 1, rows)
    return "\n".join([first, second, "".join(f"- {sentence}\n" for sentence in sensitivity(result))])


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
                loss = f"{cell.loss:.2f}" if cell.difference is None else f"{cell.difference:+.2f}"
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
