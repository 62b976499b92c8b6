#!/usr/bin/env python
"""Measure what more experts cost and buy: one dense model upcycled to 2 ... 32 experts, at equal compute per token.

    python scripts/expert_growth.py --plot expert-growth.png
    python scripts/expert_growth.py --design my.yaml --runs_file my.jsonl --costs_file costs.jsonl --workers 2

The design is configuration/upcycling_experiment.yaml, and the runs are trained as in upcycling_experiment.py. Each arm
is compared with the continued dense model, seed by seed, at equal FLOPs. Two laws of the gain are fitted, a logarithm
of the number of experts and a power law of the parameters, and each predicts the gain at a number of experts that the
fit has not seen. Time and memory are those of training steps on one thread, of all arms in one run.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments.continued_training import ROOT, Runs, RunsArguments
from experiments.design import Design
from experiments.expert_growth import grow
from experiments.expert_growth_report import draw, report
from experiments.files import refuse_missing_folders
from rich.console import Console
from rich.markdown import Markdown

from modeling_moe.utils.command_line import parse, run


@dataclass
class GrowthArguments(RunsArguments):
    """These arguments name the design, the files of the runs, and the picture."""

    costs_file: str = field(
        default=str(ROOT / "docs" / "science" / "runs" / "expert_costs.jsonl"),
        metadata={"help": "JSON Lines file of the measured costs; costs in the file are not measured again"},
    )
    plot: str | None = field(default=None, metadata={"help": "PNG file for a picture of gains and costs"})

    def __post_init__(self):
        super().__post_init__()
        refuse_missing_folders(self, "costs_file", "plot")


def main() -> None:
    """Trains the arms, writes the requested files, and prints the result."""
    (args,) = parse([GrowthArguments], __doc__)
    design = Design.read(args.design)
    result = grow(design, Runs(design, args), args.costs_file)
    text = report(design, result)
    if args.markdown:
        Path(args.markdown).write_text(text + "\n", encoding="utf-8")
    if args.plot:
        draw(args.plot, result)
    Console().print(Markdown(text))


if __name__ == "__main__":
    run(main)
