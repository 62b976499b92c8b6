#!/usr/bin/env python
"""Measure how long virtual groups stay whole: an exactly upcycled model whose routers learn splits its replicas.

    python scripts/virtual_groups.py

The dense model and the arm "virtual groups, exact" are those of upcycling_experiment.py. The table shows the share of
tokens whose experts are all shards of one replica, and the held-out loss, after some steps of training at a constant
learning rate, for narrow and wide initial routers, with 95% intervals over seeds.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments.continued_training import ROOT, Runs, RunsArguments
from experiments.design import Design
from experiments.files import refuse_missing_folders
from experiments.virtual_groups import report, watch_all
from rich.console import Console
from rich.markdown import Markdown

from modeling_moe.utils.command_line import parse, run


@dataclass
class WatchArguments(RunsArguments):
    """These arguments name the design and the files of the runs."""

    groups_file: str = field(
        default=str(ROOT / "docs" / "science" / "runs" / "virtual_groups.jsonl"),
        metadata={"help": "JSON Lines file of finished measurements; those in the file are not repeated"},
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_missing_folders(self, "groups_file")


def main() -> None:
    """Trains the model for some steps, writes the requested file, and prints the table."""
    (args,) = parse([WatchArguments], __doc__)
    design = Design.read(args.design)
    text = report(watch_all(design, Runs(design, args), args.groups_file))
    if args.markdown:
        Path(args.markdown).write_text(text + "\n", encoding="utf-8")
    Console().print(Markdown(text))


if __name__ == "__main__":
    run(main)
