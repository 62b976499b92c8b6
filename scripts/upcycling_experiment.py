#!/usr/bin/env python
"""Measure whether more experts learn more at equal compute: upcycled models and the dense one learn facts.

    python scripts/upcycling_experiment.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --workers 2 \\
        --runs_file runs.jsonl --output_json experiment.json
    python scripts/upcycling_experiment.py --model_name_or_path ./dense --only dense "virtual groups, exact" --steps
        60

The states that enter the last --layers layers are computed once. Then the feed-forward networks and routers of these
layers are trained on facts (a name, six random digits) and prose (Python's language reference); attention is frozen,
and the head has only the tokens of this data. A token uses equally many neurons in all arms; an arm in which it uses
more trains for fewer steps. Short runs on separate facts find the learning rate of each arm; then the arm is trained
with --seeds seeds. A difference is claimed only if the 95% interval over paired seeds (Student's t) excludes 0.
Recall is the main measure. The intervals are not corrected for their number: one of 20 intervals excludes 0 although
the true difference is 0.
"""

from dataclasses import asdict

from experiments.files import write_json
from experiments.upcycling_facts import FactsArguments, FactsResult, Run, facts_experiment
from rich.console import Console
from rich.table import Table

from modeling_moe.utils.command_line import parse, run


def mean(runs: list[Run], metric: str) -> float:
    """Returns the mean of a metric over the runs of an arm."""
    return sum(getattr(run, metric) for run in runs) / len(runs)


def print_result(result: FactsResult) -> None:
    """Prints one row for each arm with means over seeds, and the sentence that each comparison allows."""
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
    """Trains the arms, writes the requested file, and prints the results."""
    (args,) = parse([FactsArguments], __doc__)
    result = facts_experiment(args)
    if args.output_json:
        claims = [comparison.claim for comparison in result.comparisons]
        write_json(args.output_json, asdict(args), asdict(result) | {"claims": claims})
    print_result(result)


if __name__ == "__main__":
    run(main)
