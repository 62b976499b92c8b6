#!/usr/bin/env python
"""Do more experts learn more at equal compute? Upcycled models and the dense one learn facts and read on.

    python scripts/upcycling_experiment.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --workers 2 \\
        --runs_file runs.jsonl --output_json experiment.json
    python scripts/upcycling_experiment.py --model_name_or_path ./dense --only dense "virtual groups, exact" --steps 60

The states that enter the last --layers layers are computed once; then the feed-forward networks and routers of those
layers are trained on facts (a name, six random digits) and prose (Python's language reference). Attention is computed but
frozen, and the head knows the tokens of this data alone. All arms meet the same number of neurons a token; one that meets
more trains for fewer steps. Each arm has a learning rate of its own, found by short runs on facts of their own, and then
--seeds runs. A difference is claimed only if the 95% interval over paired seeds (Student's t) leaves out 0; recall is the
measure that the experiment was made for. The intervals are not corrected for their number: of 20 true zeros one is left out.
"""

from dataclasses import asdict

from experiments.upcycling_facts import (
    CapacityArguments,
    CapacityResult,
    Run,
    capacity_experiment,
)
from experiments.upcycling_initial_loss import write_json
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def mean(runs: list[Run], metric: str) -> float:
    """Of the runs of an arm."""
    return sum(getattr(run, metric) for run in runs) / len(runs)


def print_result(result: CapacityResult) -> None:
    """Prints one row for each arm, the means over its seeds, and what may be claimed."""
    table = Table(title=f"{result.tokens:,} tokens a run, means over seeds")
    for column in ("arm", "neurons a token", "steps", "rate"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for column in ("recall, bits a digit", "facts exact", "prose loss before", "after"):
        table.add_column(column, justify="right")
    for arm, rate in result.rates.items():
        runs = [run for run in result.runs if run.arm == arm]
        table.add_row(
            arm,
            f"{result.active_widths[arm]:,}",
            f"{result.steps[arm]}",
            f"{rate:g}",
            f"{mean(runs, 'recall_bits'):.3f}",
            f"{mean(runs, 'exact_match'):.1%}",
            f"{mean(runs, 'initial_prose_loss'):.3f}",
            f"{mean(runs, 'prose_loss'):.3f}",
        )
    console = Console()
    console.print(table)
    for comparison in result.comparisons:
        console.print(comparison.claim, soft_wrap=True, highlight=False)


def main() -> None:
    """Trains, writes the results where asked to, and prints them."""
    (args,) = parse([CapacityArguments], __doc__)
    result = capacity_experiment(args)
    if args.output_json:
        claims = [comparison.claim for comparison in result.comparisons]
        write_json(args.output_json, args, asdict(result) | {"claims": claims})
    print_result(result)


if __name__ == "__main__":
    run(main)
