#!/usr/bin/env python
"""Measure how far the importance ratio of a rollout in bf16 is from 1, with and without routing replay.

    python scripts/rollout_ratio.py --output_json ratio.json
    python scripts/rollout_ratio.py --families moe --num_experts 128 --num_experts_per_tok 8

A copy of the model in bf16 samples answers; the model in fp32 reads the answers, as a trainer does. Weights are random,
and equal up to rounding, so that the ratio should be 1 at each token. The table has means over --seeds seeds.
"""

from dataclasses import asdict

from experiments.files import write_json
from experiments.rollout_ratio import Ratio, RatioArguments, Result, rollout_ratio
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def print_results(results: list[Result]) -> None:
    """Prints two rows for each family: with the policy's own choices, and with those of the rollout."""
    table = Table()
    for column in ("model", "choices", "variance of ratio", "divergence", "largest |log ratio|", "other experts"):
        table.add_column(column, justify="left" if column in ("model", "choices") else "right")
    for family in dict.fromkeys(result.family for result in results):
        own = [result for result in results if result.family == family]
        for choices, ratios in (("own", [one.without for one in own]), ("replayed", [one.replayed for one in own])):
            mean = Ratio(*(sum(values) / len(values) for values in zip(*ratios, strict=True)))
            table.add_row(
                family,
                choices,
                f"{mean.variance:.2e}",
                f"{mean.divergence:.2e}",
                f"{mean.largest:.2f}",
                f"{mean.different:.2%}",
            )
    Console().print(table)


def main() -> None:
    """Measures the ratios, writes the requested file, and prints the table."""
    (args,) = parse([RatioArguments], __doc__)
    results = rollout_ratio(args)
    if args.output_json:
        rows = [
            one._asdict() | {"without": one.without._asdict(), "replayed": one.replayed._asdict()} for one in results
        ]
        write_json(args.output_json, asdict(args), {"results": rows})
    print_results(results)


if __name__ == "__main__":
    run(main)
