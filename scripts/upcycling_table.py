#!/usr/bin/env python
"""What each way to upcycle does to a dense model before any training: one row for each method, published ones too.

    python scripts/upcycling_table.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_json table.json
    python scripts/upcycling_table.py --model_name_or_path ./dense --data wiki=wiki.txt code=code.jsonl
    python scripts/upcycling_table.py --model_name_or_path ./dense --only copy "virtual groups, Megatron"

Without --data the text is what Python ships: its language reference and modules of its library. Delta loss is in nats per
token over the dense model's, logits are compared in fp32. A method that claims to compute the dense function and misses it
by more than 1e-3 in a logit is an error: exit code 2.
"""

from dataclasses import asdict

from experiments.upcycling_initial_loss import (
    StepZeroTable,
    TableArguments,
    refuse_broken_claims,
    step_zero_table,
    write_json,
)
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def print_table(table: StepZeroTable) -> None:
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
            "no" if result.inexactness else "yes",
            f"{result.delta_loss:+.4f}",
            f"{result.largest_difference:.1e}",
        )
    Console().print(printed)


def main() -> None:
    """Measures, writes the results where asked to, prints them, and fails if a claim does not hold."""
    (args,) = parse([TableArguments], __doc__)
    table = step_zero_table(args)
    if args.output_json:
        write_json(args.output_json, args, asdict(table))
    print_table(table)
    refuse_broken_claims(table.results)


if __name__ == "__main__":
    run(main)
