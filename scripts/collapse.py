#!/usr/bin/env python
"""Try cures of routing collapse: which losses and controllers prevent it, from which coefficient on.

    python scripts/collapse.py --runs_file runs.jsonl --markdown collapse.md --plot collapse.png
    python scripts/collapse.py --only "balance loss, batch" "bias controller" --seeds 2

The script trains a small top-1 model whose router collapses, without cure and with each cure, coefficient and learning
rate of --cures_file, with several seeds, and bytes as tokens. An expert is starved if it has less than a tenth of the
mean load on held-out text. A run is collapsed if a quarter of the experts, or more, is starved. Each cell of the table
has the share of starved experts, the number of collapsed seeds, and the held-out loss in nats per token minus the loss
without cure. A star marks a share or a loss that really differs from the one without cure: paired by seed, p-value
adjusted by Holm for the cells of the learning rate. With --runs_file the same command continues a stopped experiment.
"""

from pathlib import Path

from experiments.collapse import CollapseArguments, collapse_experiment
from experiments.collapse_table import markdown, plot_phases, verdicts
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def main() -> None:
    """Trains the models, writes the requested files, and prints the coefficients that prevent collapse."""
    (args,) = parse([CollapseArguments], __doc__)
    result = collapse_experiment(args)
    if args.markdown:
        Path(args.markdown).write_text(markdown(result), encoding="utf-8")
    if args.plot:
        plot_phases(args.plot, result)
    table = Table(title=f"coefficients without collapse in {args.seeds} seeds")
    for column in ("cure", "field", *(f"rate {rate:g}" for rate in result.learning_rates)):
        table.add_column(column)
    for row in verdicts(result):
        table.add_row(*row[:-1])
    Console().print(table)


if __name__ == "__main__":
    run(main)
