#!/usr/bin/env python
"""Measure what a model forgets of its first domains when it learns another, with and without new or frozen experts.

    python scripts/expert_drift.py --runs_file docs/science/runs/expert_drift.jsonl --markdown tables.md
    python scripts/expert_drift.py --seeds 2 --steps 60 --later_steps 20

A small model reads bytes of the kinds of text that Python's standard library makes. Each seed trains it on four kinds,
A, and then on another, B, in five ways. The forgetting is the rise of the loss on held-out text of A in nats per byte.
The drift of the old experts is measured by modeling_moe.monitoring.expert_drift. Seeds are paired, intervals are
Student's t, and p-values are adjusted by Holm's method. With --runs_file the same command continues a stopped run.
"""

from pathlib import Path

from experiments.expert_drift import ARMS, METRICS, DriftArguments, compare, comparisons, markdown, mean_of
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def main() -> None:
    """Trains the arms, writes the requested file, and prints the results."""
    (args,) = parse([DriftArguments], __doc__)
    runs = compare(args)
    if args.markdown:
        Path(args.markdown).write_text(markdown(runs), encoding="utf-8")
    table = Table(title=f"{len(runs)} seeds")
    for column in ("arm", "forgetting of A", "loss on B", "change of old outputs", "re-routed"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in ARMS:
        values = {name: mean_of(runs, arm, name) for name in ("forgetting", "loss_b", "output_change", "rerouted")}
        table.add_row(
            arm,
            f"{values['forgetting']:+.3f}",
            f"{values['loss_b']:.3f}",
            f"{values['output_change']:.0%}",
            f"{values['rerouted']:.0%}",
        )
    console = Console()
    console.print(table)
    for metric, first, second, difference, p_value in comparisons(runs):
        console.print(
            f"{METRICS[metric]}, {first} minus {second}: {difference.mean:+.3f} "
            f"({difference.low:+.3f} to {difference.high:+.3f}), adjusted p {p_value:.2g}",
            soft_wrap=True,
            highlight=False,
        )


if __name__ == "__main__":
    run(main)
