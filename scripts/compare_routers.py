#!/usr/bin/env python
"""Train each router of the catalogue on the same text from the same weights; report loss, balance and entropies.

    python scripts/compare_routers.py --workers 2 --runs_file runs.jsonl --output_json routers.json --plot routers.png
    python scripts/compare_routers.py --only topk "topk, no balance" --steps 100
    python scripts/compare_routers.py --data wiki=wiki.txt code=code.jsonl --routers_file my_routers.yaml

The script trains a small model for each configuration of --routers_file, with bytes as tokens. Without --data the
text is Python's language reference and modules of Python's library. Losses are nats per byte without router losses:
the training loss is the mean of the last 50 steps, the held-out loss is measured in evaluation mode. MaxVio is the
busiest expert's load over the mean load, minus 1. Entropies are in nats: the mean entropy of a token's probabilities,
and the entropy of the mean probabilities, which is ln 8 in balance and low in collapse. A router that is not causal
sees later tokens, so that its loss cannot be compared. With --runs_file the same command continues a stopped
comparison.
"""

from dataclasses import asdict
from pathlib import Path

from experiments.files import write_json
from experiments.router_comparison import (
    ComparisonArguments,
    RouterResult,
    compare_routers,
    markdown_table,
    plot_curves,
)
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def print_results(results: list[RouterResult], steps: int) -> None:
    """Prints one row for each router."""
    table = Table(title=f"{steps} steps", show_lines=True)
    for column in ("router", "config line", "causal", "source"):
        table.add_column(column)
    for column in ("train", "held-out", "MaxVio", "H token", "H marginal", "experts", "dropped"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.name,
            result.config_line,
            "yes" if result.causal else "no",
            result.source,
            f"{result.train_loss:.3f}",
            f"{result.held_out_loss:.3f}",
            f"{result.max_vio:.2f}",
            f"{result.token_entropy:.2f}",
            f"{result.marginal_entropy:.2f}",
            f"{result.mean_experts:.2f}",
            "" if result.dropped_share is None else f"{result.dropped_share:.1%}",
        )
    Console().print(table)


def main() -> None:
    """Trains the routers, writes the requested files, and prints the results."""
    (args,) = parse([ComparisonArguments], __doc__)
    results = compare_routers(args)
    if args.output_json:
        write_json(args.output_json, asdict(args), {"routers": [asdict(result) for result in results]})
    if args.markdown:
        Path(args.markdown).write_text(markdown_table(results), encoding="utf-8")
    if args.plot:
        plot_curves(args.plot, results)
    print_results(results, args.steps)


if __name__ == "__main__":
    run(main)
