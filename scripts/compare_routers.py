#!/usr/bin/env python
"""Train each router of the catalogue over several seeds, and say which differences in held-out loss are real.

    python scripts/compare_routers.py --runs_file runs.jsonl --markdown routers.md --plot routers.png
    python scripts/compare_routers.py --only topk "topk, no balance" --steps 100 --seeds 3
    python scripts/compare_routers.py --data wiki=wiki.txt code=code.jsonl --routers_file my_routers.yaml

The script trains a small model for each configuration of --routers_file and each seed, with bytes as tokens. In one
seed all routers have equal batches, and equal weights outside the routers. Without --data the text is Python's
language reference and modules of Python's library. Losses are nats per byte without router losses; the held-out loss
is measured in evaluation mode. Intervals have 95 % by Student's t over seeds. The places come from Tukey's test of all
pairs; the differences from --baseline are paired by seed, with p-values adjusted by Holm. A router that is not causal
sees later tokens, so that its loss cannot be compared. MaxVio is the busiest expert's load over the mean load, minus
1. Entropies are in nats: the mean entropy of a token's probabilities, and the entropy of the mean probabilities, which
is ln 8 in balance and low in collapse. With --runs_file the same command continues a stopped comparison.
"""

from dataclasses import asdict
from pathlib import Path

from experiments.files import write_json
from experiments.router_comparison import ComparisonArguments, compare_routers
from experiments.router_table import Standing, markdown, plot_standings, standings
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def print_standings(rows: list[Standing], baseline: str, title: str) -> None:
    """Prints one row for each router."""
    table = Table(title=title)
    table.add_column("router", no_wrap=True)
    for column in ("place", "held-out", f"minus {baseline}", "p", "MaxVio", "experts"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.result.entry.name,
            row.place,
            row.loss_text,
            row.difference_text,
            row.p_text,
            f"{row.mean('max_vio'):.2f}",
            f"{row.mean('mean_experts'):.1f}",
        )
    Console().print(table)


def main() -> None:
    """Trains the routers, writes the requested files, and prints the ranking."""
    (args,) = parse([ComparisonArguments], __doc__)
    results = compare_routers(args)
    if args.output_json:
        write_json(args.output_json, asdict(args), {"routers": [asdict(result) for result in results]})
    baseline = args.baseline or results[0].entry.name
    rows, ranked = standings(results, baseline)
    if args.markdown:
        Path(args.markdown).write_text(markdown(rows, ranked, baseline), encoding="utf-8")
    if args.plot:
        plot_standings(args.plot, rows, ranked)
    print_standings(rows, baseline, f"{args.steps} steps, {args.seeds} seeds")


if __name__ == "__main__":
    run(main)
