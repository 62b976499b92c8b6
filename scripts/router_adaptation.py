#!/usr/bin/env python
"""Measure whether meta-trained routers adapt to an unseen domain from 64 tokens by one gradient step.

    python scripts/router_adaptation.py --runs_file docs/science/runs/router_adaptation.jsonl --markdown tables.md
    python scripts/router_adaptation.py --seeds 2 --steps 100 --router_steps 20

A small model reads words of 40 languages, from Debian's dictionaries for hunspell. Each seed trains it on 26 languages,
then its routers alone: by ordinary training, and by first-order MAML (arXiv:1703.03400). The routers of all arms are
adapted by one step on 64 bytes of each of 8 other languages, with the step size that is best on the 6 that are left,
and the loss on rows of 32 bytes of other words is measured in nats per byte. Seeds are paired, intervals are Student's
t, and p-values are adjusted by Holm's method. With --runs_file the same command continues a stopped run.
"""

from pathlib import Path

from experiments.router_adaptation import ARMS, IN_CONTEXT, AdaptationArguments, compare, comparisons, markdown
from experiments.small_models import means
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def main() -> None:
    """Trains the arms, writes the requested file, and prints the results."""
    (args,) = parse([AdaptationArguments], __doc__)
    runs = compare(args)
    if args.markdown:
        Path(args.markdown).write_text(markdown(runs), encoding="utf-8")
    table = Table(title=f"{len(runs)} seeds, {args.support} tokens of support")
    table.add_column("routers")
    table.add_column("held-out loss", justify="right")
    for arm in (*ARMS, IN_CONTEXT):
        table.add_row(arm, f"{sum(means(one.losses[arm]) for one in runs) / len(runs):.4f}")
    console = Console()
    console.print(table)
    for first, second, difference, p_value in comparisons(runs):
        console.print(
            f"{first} minus {second}: {difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f}), "
            f"adjusted p {p_value:.2g}",
            soft_wrap=True,
            highlight=False,
        )


if __name__ == "__main__":
    run(main)
