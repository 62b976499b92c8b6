# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the result of the experiment on the number of experts as a table, sentences and a picture."""

import statistics
from typing import Any

from .design import Design
from .expert_growth import LAWS, Fit, GrowthResult
from .intervals import Interval


def _signed(found: Interval, digits: int = 4) -> str:
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def report(design: Design, result: GrowthResult) -> str:
    """Returns the result in GitHub Markdown: a table of the arms, and a table of the laws."""
    return "\n".join([*_arms_table(design, result), "", *_laws_table(result)])


def _arms_table(design: Design, result: GrowthResult) -> list[str]:
    dense, *arms = result.runs
    lines = [
        "| arm | parameters | of dense | steps | rate | loss | gain over dense | time of a step | memory to train |"
    ]
    lines.append("|---" + "|---:" * 8 + "|")
    for arm in (dense, *arms):
        runs, parameters = result.runs[arm], design.config(arm).num_params()
        cells = [arm, f"{parameters:,}", f"{parameters / design.config(dense).num_params():.2f}x", f"{runs[0].steps}"]
        cells += [f"{result.rates[arm]:g}", f"{statistics.fmean(run.test_loss for run in runs):.4f}"]
        cells += ["" if arm == dense else _signed(result.gains[arm])]
        cost, base = result.costs[arm], result.costs[dense]
        cells += [f"{cost.step_seconds / base.step_seconds:.2f}x", f"{cost.training_bytes / base.training_bytes:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _laws_table(result: GrowthResult) -> list[str]:
    lines = ["| law of the gain | coefficients | residual | error at a left-out E | at the largest E |"]
    lines.append("|---|---|---:|---:|---:|")
    for name, fit in result.fits.items():
        values = ", ".join(f"{coefficient} = {_signed(value)}" for coefficient, value in fit.values.items())
        numbers = [f"{fit.residual:.4f}", f"{fit.left_out:.4f}", f"{fit.largest:+.4f}"]
        lines.append(f"| {name}: {LAWS[name].formula} | {values} | {' | '.join(numbers)} |")
    return lines


def draw(path: str, result: GrowthResult) -> None:
    """Draws the gains with both laws, and the costs, over the number of experts, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    gain, cost = figure.subplots(1, 2)
    dense, *arms = result.runs
    experts, found = [result.experts[arm] for arm in arms], [result.gains[arm] for arm in arms]
    ends = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
    gain.errorbar(
        experts, [each.mean for each in found], ends, fmt="o", color="black", capsize=3, label="measured, 95 %"
    )
    for color, (name, fit) in zip(("tab:blue", "tab:orange"), result.fits.items(), strict=True):
        _draw_law(gain, fit, color, f"{name}: {LAWS[name].formula}")
    gain.axhline(0, color="0.7", linewidth=0.8)
    gain.set(xlabel="experts E", ylabel="loss of dense minus loss (nats per byte)")
    base = result.costs[dense]
    for label, values in {
        "time of a training step": [result.costs[arm].step_seconds / base.step_seconds for arm in arms],
        "memory to train": [result.costs[arm].training_bytes / base.training_bytes for arm in arms],
        "parameters": [result.parameters[arm] for arm in arms],
    }.items():
        cost.plot(experts, values, marker="o", label=label)
    cost.set(xlabel="experts E", ylabel="relative to dense", yscale="log")
    for panel in (gain, cost):
        panel.set_xscale("log", base=2)
        panel.set_xticks(experts, [str(number) for number in experts])
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=130, format="png")


def _draw_law(panel: Any, fit: Fit, color: str, label: str) -> None:
    panel.plot(fit.grid, [each.mean for each in fit.curve], color=color, label=label)
    lows, highs = [each.low for each in fit.curve], [each.high for each in fit.curve]
    panel.fill_between(fit.grid, lows, highs, color=color, alpha=0.15, linewidth=0)
