# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reports a run: a JSON file, complete after every case, and tables for a terminal of 100 columns."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import MODES, Case
from .results import Result, compare_cases
from .tables import case_table, comparison_table, lora_table, mode_table, offload_table, watching_table


WIDTH = 100
_LEGEND = (
    "transformers: the fastest of its implementations. limit: dense products of equal FLOPs; in decode, bytes of the "
    "active weights over the bandwidth of a copy. saved, peak: bytes relative to grouped_mm."
)
_COMPARED = (
    "Ratios of other numbers of experts exclude the time to move the weights; those of other routings include it."
)


class Report:
    """Holds the results of a run.

    Attributes:
        facts: description of the machine.
        cases: all cases of the run.
        results: results measured until now.
        stopped: why the run ended before its last case; None if it did not.
    """

    def __init__(self, facts: dict[str, Any], cases: Sequence[Case], path: str | Path | None = None):
        self.facts, self.cases, self.path = facts, cases, path
        self.results: list[Result] = []
        self.stopped: str | None = None
        self.write()

    def add(self, result: Result) -> None:
        """Adds the result of a case, and writes the file."""
        self.results.append(result)
        self.write()

    @property
    def not_run(self) -> Sequence[Case]:
        """Cases without a result."""
        return self.cases[len(self.results) :]

    @property
    def failed(self) -> list[Result]:
        """Results of cases in which this package failed."""
        return [result for result in self.results if result.failures]

    def write(self) -> None:
        """Writes all results as JSON, including the times of each round, if there is a file.

        If the run is killed, the file of the previous case remains.
        """
        if self.path is None:
            return
        path = Path(self.path)
        content = {
            "machine": self.facts,
            "results": [result.to_json() for result in self.results],
            "comparisons": [
                {"case": str(comparison.case), "base": str(comparison.base), "ratio": comparison.ratio}
                for comparison in compare_cases(self.results)
            ],
            "failed": [str(result.case) for result in self.failed],
            "not_run": [str(case) for case in self.not_run],
            "stopped": self.stopped,
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)

    def print(self) -> None:
        """Prints a table of contestants for each case, a table of this package in all cases, then failures and
        skipped cases.
        """
        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(width=WIDTH)
        console.print(", ".join(f"{name} {value}" for name, value in self.facts.items()), highlight=False)
        for result in self.results:
            if result.times or result.failures:
                _section(console, _heading(result), case_table(result))
        for mode in MODES:
            chosen = [result for result in self.results if result.case.mode == mode]
            if chosen:
                _section(console, *_overview(mode.replace("_", " + "), chosen))
        if any(result.case.level not in ("lora", "watching", "offload") for result in self.results):
            console.print(f"[italic]{_LEGEND}[/italic]", highlight=False)
        comparisons = compare_cases(self.results)
        if comparisons:
            _section(console, "ours over dense, over that of another case", comparison_table(comparisons), _COMPARED)
        console.print()
        for line in self._notes():
            console.print(escape(line), highlight=False)

    def _notes(self) -> list[str]:
        """Returns a line for each reason to skip an implementation, for each failure, and for each case that was
        not run.
        """
        reasons = Counter((name, reason) for result in self.results for name, reason in result.skipped.items())
        notes = []
        for (name, reason), count in reasons.items():
            cases = [str(result.case) for result in self.results if result.skipped.get(name) == reason]
            where = f"{count} cases" if count > 3 else "; ".join(cases)
            notes.append(f"not measured, {name}: {reason} ({where})")
        notes += [f"not run, {self.stopped}: {case}" for case in self.not_run]
        return notes + [f"FAILED, {result.case}: {result.error}" for result in self.failed]


def _overview(mode: str, results: list[Result]) -> tuple[str, Table]:
    """Returns title and table of all cases of a mode, which have one level or are compared like the experts alone."""
    level = results[0].case.level
    if level == "lora":
        return f"{mode}: LoRA on experts here, and ours over", lora_table(results)
    if level == "watching":
        return f"{mode}: the routing logged, over not logged", watching_table(results)
    if level == "offload":
        return f"{mode}: the experts on disk", offload_table(results)
    return f"{mode}: ours, and ours over", mode_table(results)


def _section(console: Console, title: str, table: Table, legend: str | None = None) -> None:
    console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
    console.print(table)
    if legend is not None:
        console.print(f"[italic]{escape(legend)}[/italic]", highlight=False)


def _heading(result: Result) -> str:
    rounds = max((len(times) for times in result.times.values()), default=0)
    backend = next(iter(result.backends.values()), None)
    facts = [backend, f"{result.tiles} tiles" if result.tiles else None, f"{rounds} rounds"]
    return f"{result.case}: {', '.join(fact for fact in facts if fact)}"
