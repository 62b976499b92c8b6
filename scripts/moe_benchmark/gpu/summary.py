# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module prints the table that ends a GPU check: the state of each part, and every failure."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


WIDTH = 100
FAILURES = 20


def subject(row: dict[str, Any]) -> str:
    """Returns a short description of what a line measures."""
    left_out = ("part", "at_s", "error", "passed", "what")
    named = next((str(row[key]) for key in ("check", "test", "kernel", "what") if key in row), None)
    if named is not None:
        return named
    values = (value for key, value in row.items() if key not in left_out)
    return " ".join(str(value) for value in values if isinstance(value, (str, int, float)))[:60]


def failures(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines that report a failure."""
    return [row for row in rows if "error" in row]


def print_summary(rows: list[dict[str, Any]]) -> int:
    """Prints the table, at most 100 columns wide.

    Returns:
        1 if anything failed, else 0.
    """
    console, failed = Console(width=WIDTH), failures(rows)
    table = Table("part", "seconds", "lines", "checks passed", "not run", "failed", title="GPU check")
    for part in dict.fromkeys(row["part"] for row in rows):
        lines = [row for row in rows if row["part"] == part]
        checks = [row["passed"] for row in lines if "passed" in row]
        numbers = [
            f"{max(row.get('at_s', 0) for row in lines):.0f}"
            + ("" if any("ended" in row for row in lines) else " (cut)"),
            str(len(lines)),
            f"{sum(checks)} of {len(checks)}" if checks else "-",
            str(sum("not_run" in row for row in lines)),
            str(len(failures(lines))),
        ]
        table.add_row(part, *numbers)
    for row in failed[:FAILURES]:
        console.print(escape(f"FAILED {row['part']}: {subject(row)}: {row['error']}"), highlight=False)
    if len(failed) > FAILURES:
        console.print(f"and {len(failed) - FAILURES} more failures")
    for row in rows:
        if "skipped" in row and isinstance(row["skipped"], str) and "check" in row:
            console.print(escape(f"skipped {row['check']}: {row['skipped']}"), highlight=False)
        if "missing" in row:
            console.print(escape(f"not installed: {row['missing']}; omitted: {row['left_out']}"), highlight=False)
    console.print(table)
    return int(bool(failed))
