#!/usr/bin/env python
"""Measure how each method of upcycling, published ones included, changes a dense model's loss before any training.

    python scripts/upcycling_table.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_json table.json
    python scripts/upcycling_table.py --model_name_or_path ./dense --data wiki=wiki.txt code=code.jsonl
    python scripts/upcycling_table.py --model_name_or_path ./dense --only copy "virtual groups, Megatron"

Without --data the text is Python's language reference and modules of Python's library. Delta loss is the loss minus
the dense model's, in nats per token; logits are compared in fp32. If a method claims to compute the dense function
and a logit differs by more than 1e-3, the script ends with exit code 2.
"""

from dataclasses import asdict

from experiments.files import write_json
from experiments.upcycling_initial_loss import (
    InitialLossTable,
    TableArguments,
    initial_loss_table,
    refuse_broken_claims,
)
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def print_table(table: InitialLossTable) -> None:
    """Prints one row for each method."""
    printed = Table(title=f"step 0, dense loss {table.dense_loss:.4f}")
    for column in ("method", "formula", "options", "claims exactness"):
        printed.add_column(column)
    for column in ("delta loss", "largest difference"):
        printed.add_column(column, justify="right")
    for result in table.results:
        printed.add_row(
            result.name,
            result.source,
            result.options,
            "no" if result.reason_not_exact else "yes",
            f"{result.delta_loss:+.4f}",
            f"{result.largest_difference:.1e}",
        )
    Console().print(printed)


def main() -> None:
    """Measures the methods, writes the requested file, prints the table, and fails if a claim does not hold."""
    (args,) = parse([TableArguments], __doc__)
    table = initial_loss_table(args)
    if args.output_json:
        write_json(args.output_json, asdict(args), asdict(table))
    print_table(table)
    refuse_broken_claims(table.results)


if __name__ == "__main__":
    run(main)
