#!/usr/bin/env python
"""Decide which way of upcycling learns more at equal compute, by rules that were fixed before the first run.

    python scripts/upcycling_experiment.py
    python scripts/upcycling_experiment.py --design my.yaml --runs_file my.jsonl --dense_dir outputs/my --workers 2

The design is configuration/upcycling_experiment.yaml. A small Llama is trained on Python's library and documentation,
with bytes as tokens. Then all its parameters are trained further, as the dense model or upcycled, for equal FLOPs.
The command finds the learning rate of each arm, and extends the grid while an arm prefers its edge; finds the spread
between pilot seeds; computes the number of seeds; trains the compared runs; and prints the verdicts. Finished runs
are in --runs_file, and are not repeated: with all runs in it, the command only prints.
"""

from pathlib import Path

from experiments.continued_training import Runs, RunsArguments
from experiments.design import Design
from experiments.upcycling_comparison import compare, report
from rich.console import Console
from rich.markdown import Markdown

from modeling_moe.utils.command_line import parse, run


def main() -> None:
    """Trains the arms, writes the requested file, and prints the result."""
    (args,) = parse([RunsArguments], __doc__)
    design = Design.read(args.design)
    text = report(design, compare(design, Runs(design, args)))
    if args.markdown:
        Path(args.markdown).write_text(text + "\n", encoding="utf-8")
    Console().print(Markdown(text))


if __name__ == "__main__":
    run(main)
