# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How a run is told: machine, tables, notes, JSON."""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import MODES, Case
from .contestants import COPY, DENSE
from .results import Result, compare_cases
from .roofline import peak_of


WIDTH = 200


def machine_facts(device: str) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    facts: dict[str, Any] = {"device": device, "cpu": _cpu_model(), "cores": os.cpu_count()}
    facts["threads"] = torch.get_num_threads()
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    facts |= {package: installed.get(package, "not installed") for package in ("torch", "transformers", "triton")}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        peak = peak_of(facts["gpu"])
        if peak is not None:
            facts["stated_peak"] = f"{peak.tera_flops:g} TFLOP/s, {peak.tera_bytes:g} TB/s"
    return facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cell(value: float | None, form: str = "{:.3g}") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else form.format(value)


def _mode_table(mode: str, results: Sequence[Result]) -> Table:
    names = list(dict.fromkeys(name for result in results for name in result.times if name not in (COPY, DENSE)))
    ratios = list(dict.fromkeys(name for result in results for name in result.ratios()))
    saved = any(result.saved_bytes for result in results)
    peak = any(result.peak_bytes for result in results)
    floors = any(result.floors_ms for result in results)
    title = f"{mode.replace('_', ' + ')}: medians in ms"
    table = Table("preset", "dtype", "T", "routing", "back end", "rounds", *names, "limit", title=title)
    for header in [*ratios, *["saved MiB"] * saved, *["peak GiB"] * peak, *["floor c / m ms"] * floors]:
        table.add_column(header)
    for result in results:
        case, ours = result.case, result.ours
        row = [case.preset, case.dtype, f"{case.tokens}", case.routing, result.backends.get(ours or "", "-")]
        row.append(f"{max((len(times) for times in result.times.values()), default=0)}")
        row += [_cell(result.median(name)) for name in names] + [_cell(result.limit_ms)]
        row += [_cell(result.ratios().get(name), "{:.2f}") for name in ratios]
        if saved:
            row.append(_cell(result.saved_bytes[ours] / 2**20 if ours in result.saved_bytes else None))
        if peak:
            row.append(_cell(result.peak_bytes[ours] / 2**30 if ours in result.peak_bytes else None))
        if floors:
            values = [_cell(result.floors_ms.get(name)) for name in ("compute", "memory")]
            row.append(" / ".join(values))
        table.add_row(*map(escape, row))
    return table


def _comparison_table(results: list[Result]) -> Table | None:
    comparisons = compare_cases(results)
    if not comparisons:
        return None
    table = Table("case", "against", "ratio", title="ours over dense, against the same of another case")
    for comparison in comparisons:
        table.add_row(str(comparison.case), str(comparison.base), f"{comparison.ratio:.2f}")
    table.caption = "other routings as they are; other numbers of experts without the time to move the weights"
    return table


def _notes(results: Iterable[Result]) -> list[str]:
    """One line for each reason that an implementation was not measured for."""
    reasons = Counter((name, reason) for result in results for name, reason in result.skipped.items())
    notes = []
    for (name, reason), count in reasons.items():
        cases = [str(result.case) for result in results if result.skipped.get(name) == reason]
        where = f"{count} cases" if count > 3 else "; ".join(cases)
        notes.append(f"{name}: {reason} ({where})")
    return notes


def print_report(facts: dict[str, Any], results: list[Result], not_run: Sequence[Case], level: str) -> None:
    """Prints everything; a table for each mode."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDTH)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    console.print(f"level: {level}. limit: dense products of the same FLOPs; decode: active weights / copy bandwidth")
    for mode in MODES:
        chosen = [result for result in results if result.case.mode == mode]
        if chosen:
            console.print(_mode_table(mode, chosen))
    comparison = _comparison_table(results)
    if comparison is not None:
        console.print(comparison)
    for note in _notes(results):
        console.print(f"not measured, {escape(note)}", highlight=False)
    for case in not_run:
        console.print(f"not run, the budget was spent: {case}", highlight=False)


def write_json(path: str | Path, facts: dict[str, Any], results: list[Result], not_run: Sequence[Case]) -> None:
    """Writes everything, the times of each round included, whole or not at all."""
    path = Path(path)
    content = {
        "machine": facts,
        "results": [result.to_json() for result in results],
        "comparisons": [
            {"case": str(comparison.case), "base": str(comparison.base), "ratio": comparison.ratio}
            for comparison in compare_cases(results)
        ],
        "not_run": [str(case) for case in not_run],
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(path)
