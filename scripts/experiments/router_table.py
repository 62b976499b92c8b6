# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module ranks the routers of a comparison, and writes the ranking as Markdown and as a picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .byte_models import CURVE_STEPS
from .files import markdown_table
from .intervals import Difference, Interval, Ranking, holm, interval, paired, ranking
from .router_comparison import RouterResult


# a claim needs an adjusted p-value below this
ALPHA = 0.05
NOT_KNOWN = "-"


@dataclass(frozen=True)
class Standing:
    """Holds what is known of one router.

    Attributes:
        result: the router and its runs.
        loss: held-out loss in nats per token with its interval; None for one seed.
        places: lowest and highest place among the causal routers; None for other routers and without a ranking.
        difference: held-out loss minus the baseline's, paired by seed; None for the baseline, for routers that are not
            causal, and for one seed.
        p_adjusted: the difference's p-value, adjusted by Holm for the number of routers.
    """

    result: RouterResult
    loss: Interval | None
    places: tuple[int, int] | None
    difference: Difference | None
    p_adjusted: float | None

    def mean(self, name: str) -> float:
        """Returns the mean of a measured value over seeds."""
        return statistics.fmean(self.result.values(name))

    @property
    def place(self) -> str:
        """The places that the router may have."""
        return NOT_KNOWN if self.places is None else "-".join(map(str, dict.fromkeys(self.places)))

    @property
    def loss_text(self) -> str:
        """The held-out loss, with half the width of its interval if there is one."""
        half = "" if self.loss is None else f" ± {self.loss.high - self.loss.mean:.3f}"
        return f"{self.mean('held_out_loss'):.3f}{half}"

    @property
    def difference_text(self) -> str:
        """The difference with half the width of its interval."""
        if self.difference is None:
            return NOT_KNOWN
        return f"{self.difference.mean:+.3f} ± {self.difference.high - self.difference.mean:.3f}"

    @property
    def p_text(self) -> str:
        """The adjusted p-value, with a star if the difference is real."""
        if self.p_adjusted is None:
            return NOT_KNOWN
        return f"{self.p_adjusted:.3f}{' *' if self.p_adjusted < ALPHA else ''}"


def standings(results: Sequence[RouterResult], baseline: str) -> tuple[list[Standing], Ranking | None]:
    """Ranks the causal routers by held-out loss and compares each with the baseline.

    Args:
        results: at least one router; all have equal seeds.
        baseline: name of the router to compare with.

    Returns:
        the causal routers, lowest loss first, and then the others; and the ranking, None for one seed or one causal
        router.
    """
    losses = {result.entry.name: result.values("held_out_loss") for result in results}
    seeds = len(results[0].runs)
    causal = [result.entry.name for result in results if result.causal]
    ranked = ranking({name: losses[name] for name in causal}) if seeds > 1 and len(causal) > 1 else None
    against = [name for name in causal if name != baseline and seeds > 1]
    differences = {name: paired(losses[name], losses[baseline]) for name in against}
    adjusted = dict(zip(against, holm([differences[name].p_value for name in against]), strict=True))
    rows = [
        Standing(
            result=result,
            loss=interval(losses[name]) if seeds > 1 else None,
            places=(ranked.first[name], ranked.last[name]) if ranked and name in ranked.first else None,
            difference=differences.get(name),
            p_adjusted=adjusted.get(name),
        )
        for result in results
        for name in [result.entry.name]
    ]
    return sorted(rows, key=lambda row: (not row.result.causal, row.mean("held_out_loss"))), ranked


def told_apart(rows: Sequence[Standing]) -> tuple[int, int]:
    """Returns the number of pairs of causal routers that paired t-tests with Holm's correction tell apart, and of all."""
    losses = [row.result.values("held_out_loss") for row in rows if row.result.causal]
    pairs = [(a, b) for number, a in enumerate(losses) for b in losses[:number]]
    return sum(p_value < ALPHA for p_value in holm([paired(*pair).p_value for pair in pairs])), len(pairs)


def summary(rows: Sequence[Standing], ranked: Ranking) -> list[str]:
    """Returns sentences that say how well the routers are told apart."""
    means = [row.mean("held_out_loss") for row in rows if row.result.causal]
    tukey = sum(b - a > ranked.least_difference for a in means for b in means)
    found, pairs = told_apart(rows)
    return [
        f"Two causal routers are told apart if their means differ by {ranked.least_difference:.3f} nats or more.",
        f"Tukey's test tells {tukey} of {pairs} pairs apart.",
        f"Paired t-tests with Holm's correction, which assume no equal deviations, tell {found} of them apart.",
        f"The deviation of a run, without the effects of router and seed, is {ranked.deviation:.3f} nats; "
        f"the test of equal deviations (Brown-Forsythe) has p = {ranked.spread_p_value:.3f}.",
    ]


def markdown(rows: Sequence[Standing], ranked: Ranking | None, baseline: str) -> str:
    """Returns the ranking, its summary and the configurations in GitHub Markdown."""
    columns = [
        "router",
        "place",
        "held-out",
        f"minus {baseline}",
        "p",
        "experts",
        "MaxVio",
        "starved",
        "H token / marginal",
    ]
    cells = [
        [
            row.result.entry.name + ("" if row.result.causal else " (not causal)"),
            row.place,
            row.loss_text,
            row.difference_text,
            row.p_text,
            f"{row.mean('mean_experts'):.1f}",
            f"{row.mean('max_vio'):.2f}",
            f"{row.mean('starved_share'):.0%}",
            f"{row.mean('token_entropy'):.2f} / {row.mean('marginal_entropy'):.2f}",
        ]
        for row in rows
    ]
    parts = [markdown_table(columns, 1, cells)]
    if ranked is not None:
        parts.append("".join(f"- {sentence}\n" for sentence in summary(rows, ranked)))
    sources = [[row.result.entry.name, f"`{row.result.entry.config_line}`", row.result.entry.source] for row in rows]
    parts.append(markdown_table(["router", "config line", "source"], 3, sources))
    return "\n".join(parts)


def plot_standings(path: str, rows: Sequence[Standing], ranked: Ranking | None) -> None:
    """Draws the held-out losses, and MaxVio over the steps.

    A bar of a causal router is as wide as the least difference that is told apart, so that two bars that do not overlap
    are told apart. The right panel shows the means over seeds of the highlighted routers, or of all if none is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.5 + 0.2 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    half = None if ranked is None else ranked.least_difference / 2
    for place, row in enumerate(rows):
        color, bar = ("tab:blue", half) if row.result.causal else ("0.6", None)
        left.errorbar(row.mean("held_out_loss"), place, xerr=bar, fmt="o", color=color, markersize=4, capsize=2)
    names = [row.result.entry.name + ("" if row.result.causal else " (not causal)") for row in rows]
    left.set_yticks(range(len(rows)), names, fontsize="small")
    left.invert_yaxis()
    left.set(xlabel="held-out loss (nats per token); routers whose bars do not overlap are told apart")
    left.grid(axis="x", color="0.93")
    some = any(row.result.entry.highlight for row in rows)
    for row in rows:
        if some and not row.result.entry.highlight:
            continue
        curves = [run.max_vios for run in row.result.runs]
        means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        steps = [CURVE_STEPS * (number + 1) for number in range(len(means))]
        right.plot(steps, means, label=row.result.entry.name, linewidth=1.6)
    right.set(xlabel="step", ylabel="MaxVio of the load (0: balanced)")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
