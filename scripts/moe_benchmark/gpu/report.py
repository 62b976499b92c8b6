# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the page of a GPU check: targets, time of each pass and kernel, memory, and proposed tiles."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..presets import PRESETS
from . import science_report, tile_table
from .kernels import TILE
from .science_report import table
from .summary import failures, subject
from .targets import PASSES, TARGETS, select


Row = dict[str, Any]
DENSE = "dense"
SORTING = ("count_slots", "place_slots", "map_rows")
PRODUCTS = ("project_up", "multiply", "multiply_persistent", "gate_backward", "weight_gradient")
INTRODUCTION = """# Speed on a GPU

`python3 scripts/gpu_report.py` wrote this page from one run of `bash scripts/gpu_check.sh`. Times are medians in ms. All
contestants of a comparison take turns; before, outputs and gradients of each are compared with a float64 oracle.
"""


def latest(files: Iterable[Sequence[Row]]) -> list[Row]:
    """Joins the lines of several runs; of a part that is in more than one, the lines of the last run are taken."""
    parts: dict[str, list[Row]] = {}
    for rows in files:
        names = dict.fromkeys(row["part"] for row in rows)
        parts |= {name: [row for row in rows if row["part"] == name] for name in names}
    return [row for rows in parts.values() for row in rows]


def number(value: float | None, form: str = "{:.3g}") -> str:
    """Returns the text of a cell: `-` for None, and no decimals from 1000 on."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else form.format(value)


def machine(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section on the machine."""
    facts: Row = {}
    for row in select(rows, part="environment"):
        facts |= {f"{row['product']} TFLOP/s": row["tflops"]} if "product" in row else row
    stated = [name for name in facts if name not in ("part", "at_s", "missing", "left_out", "ended", "error")]
    if stated:
        yield "## Machine"
        yield from (f"- {name}: {_value_text(facts[name])}" for name in stated)


def _value_text(value: Any) -> str:
    return number(value, "{:.4g}") if isinstance(value, float) else str(value)


def targets(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section on targets, met or not."""
    yield "## Targets"
    yield "The targets are for the experts of one layer of Qwen3-30B-A3B (128 experts, H 2048, I 768, 8 per token) in bf16 on one H200."
    yield ""
    yield from table(["target", "bound", "measured", ""], [target.cells(rows) for target in TARGETS])


def correctness(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section on checks, and all failures of all parts."""
    checks = [row for row in rows if "check" in row and row["part"] != "science"]
    if checks:
        yield "## Correctness"
        header = ["check", "passed", "found"]
        cells = []
        for row in checks:
            passed = "yes" if row.get("passed") else "not run" if "skipped" in row else "**no**"
            hidden = ("part", "at_s", "check", "passed")
            found = ", ".join(f"{key} {_value_text(value)}" for key, value in row.items() if key not in hidden)
            cells.append([row["check"], passed, found.replace("|", "/")])
        yield from table(header, cells)
    failed = failures(rows)
    if failed:
        yield ""
        yield "## Failures"
        yield from (f"- {row['part']}: {subject(row)}: {row['error']}" for row in failed)
    skipped = [row for row in rows if "not_run" in row]
    if skipped:
        yield ""
        yield f"{len(skipped)} measurements were not made, because the time was over."


def _rate(row: Row, ms: float | None) -> float | None:
    """Returns the TFLOP/s of a case from its time."""
    preset, passes = PRESETS[row["preset"]], 3 if row["mode"] == "forward_backward" else 1
    work = 2 * preset.per_token * preset.expert_elements * row["tokens"] * passes
    return None if not ms else work / ms / 1e9


def comparison(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section that compares each case with other implementations and limits; a ratio above 1 favours
    this package.
    """
    cases = [row for row in select(rows, part="comparison") if "ms" in row]
    if not cases:
        return
    yield "## Against others"
    yield "Columns `grouped_mm`, `Liger` and `dense` show the time of that implementation divided by the time of `moe`; above 1 `moe` is faster."
    yield "`dense` is the matrix products of equal FLOPs for a single expert. `roofline` is the smallest time at the GPU's stated peak, divided by the time of `moe`."
    yield ""
    header = ["preset", "tokens", "pass", "routing", "ms", "TFLOP/s", "roofline", "grouped_mm", "Liger", "dense"]
    cells = []
    for row in cases:
        if row["mode"] == "decode":
            continue
        ms, floor = row["ms"].get("moe"), row["floors_ms"].get("floor")
        others = [_over(row["ms"].get(name), ms) for name in ("grouped_mm", "liger", DENSE)]
        label = [row["preset"], f"{row['tokens']:,}", PASSES[row["mode"]], row["routing"]]
        rates = [number(ms), number(_rate(row, ms)), "-" if not floor or not ms else f"{floor / ms:.0%}"]
        cells.append([*label, *rates, *others])
    yield from table(header, cells)
    yield from _decoding([row for row in cases if row["mode"] == "decode"])


def _over(value: float | None, ours: float | None) -> str:
    return "-" if not value or not ours else f"{value / ours:.2f}"


def _decoding(cases: Sequence[Row]) -> Iterator[str]:
    if not cases:
        return
    yield ""
    yield "Caches are cold in decoding. The limit is the bytes of the active experts divided by the bandwidth of a copy."
    yield ""
    header = ["preset", "tokens", "µs", "µs as a graph", "limit, µs", "graph over limit", "grouped_mm as a graph"]
    cells = []
    for row in cases:
        times = row["ms"]
        ours, graph, theirs = (times.get(name) for name in ("moe", "moe (graph)", "grouped_mm (graph)"))
        microseconds = [number(None if ms is None else 1e3 * ms) for ms in (ours, graph, row["limit_ms"])]
        ratio = row["ratios"].get("ours/limit (graph)")
        cells.append([row["preset"], str(row["tokens"]), *microseconds, number(ratio), _over(theirs, graph)])
    yield from table(header, cells)


def kernels(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section on the launches of each pass: ms and TFLOP/s, with launches of one kernel added up."""
    lines = list(select(rows, part="kernels"))
    whole = [row for row in lines if "whole_ms" in row]
    if not whole:
        return
    yield "## Kernels"
    yield "Cells show ms, and TFLOP/s of products. `sorting` is the kernels that find the rows of each expert. Launches are timed one by one;"
    yield "`whole` is the time of the uninterrupted pass."
    yield ""
    cells = []
    for row in whole:
        shape = {name: row[name] for name in ("preset", "tokens", "dtype", "scenario")}
        launches = [line for line in select(lines, **shape) if "kernel" in line]
        products = [_launches([each for each in launches if each["kernel"] == name]) for name in PRODUCTS]
        sorting = sum(each["ms"] for each in launches if each["kernel"] in SORTING)
        rest = sum(each["ms"] for each in launches if each["kernel"] not in (*SORTING, *PRODUCTS))
        label = [row["preset"], f"{row['tokens']:,}", row["dtype"], row["scenario"]]
        cells.append([*label, number(sorting), *products, number(rest), number(row["whole_ms"])])
    yield from table(["preset", "tokens", "dtype", "pass", "sorting", *PRODUCTS, "rest", "whole"], cells)


def _launches(launches: Sequence[Row]) -> str:
    if not launches:
        return "-"
    ms = sum(each["ms"] for each in launches)
    work = sum(each["ms"] * each.get("tflops", 0.0) for each in launches)
    return f"{number(ms)} ({number(work / ms, '{:.0f}')})"


def lora(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section on low-rank updates against full fine-tuning, and against PEFT in a model of two layers."""
    lines = list(select(rows, part="lora"))
    ratios = [row for row in lines if "lora_over_full" in row]
    if ratios:
        yield "## LoRA on experts"
        yield "The table shows the time of forward and backward of one layer's experts with LoRA of rank 16, divided by the time with gradients of all matrices."
        yield ""
        cells = [[row["preset"], f"{row['tokens']:,}", f"{row['lora_over_full']:.2f}"] for row in ratios]
        yield from table(["preset", "tokens", "LoRA over full"], cells)
    models = [row for row in lines if "mode" in row and "ms" in row]
    if models:
        names = list(dict.fromkeys(name for row in models for name in row["ms"]))
        yield ""
        yield "Time of forward and backward of a model of two layers, in ms:"
        yield ""
        cells = [
            [row["preset"], f"{row['tokens']:,}", *(number(row["ms"].get(name)) for name in names)] for row in models
        ]
        yield from table(["preset", "tokens", *names], cells)


def memory(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section on the memory of forward plus backward, by implementation."""
    lines = [row for row in select(rows, part="memory") if "peak_bytes" in row]
    if not lines:
        return
    yield "## Memory"
    yield "The table shows the peak of forward and backward beyond weights and inputs, the peak without the weights' gradients"
    yield "(which every implementation must write), and the memory kept between forward and backward."
    yield ""
    cells = []
    for row in lines:
        same = select(lines, preset=row["preset"], tokens=row["tokens"], implementation="grouped_mm")
        base = next(iter(same), None)
        shares = (
            ["-"] * 3
            if base is None
            else [_over(size, other) for size, other in zip(_sizes(row), _sizes(base), strict=True)]
        )
        sizes = [number(size / 2**30) for size in _sizes(row)]
        cells.append([row["preset"], f"{row['tokens']:,}", row["implementation"], *sizes, *shares])
    measures = ("peak", "peak without gradients", "kept")
    header = [*(f"{name}, GiB" for name in measures), *(f"{name} / grouped_mm" for name in measures)]
    yield from table(["preset", "tokens", "implementation", *header], cells)


def _sizes(row: Row) -> tuple[int, int, int]:
    """Returns the bytes of the peak, of the peak without the weights' gradients, and of tensors saved for backward."""
    return row["peak_bytes"], row["peak_bytes"] - row["gradient_bytes"], row["saved_bytes"]


def tiles(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the section on the times of other tiles, and the proposed table."""
    proposed = tile_table.propose(rows)
    if proposed is None:
        return
    family, numbers, entries = proposed
    yield "## Tiles"
    yield f"A tile is {', '.join(TILE)}. Times are those of the kernels that use the field."
    yield ""
    cells = []
    for (preset, tokens, dtype, scenario, field), lines in tile_table.fields_swept(rows).items():
        current, best = tile_table.best_of(lines)
        if current is not None and best is not None:
            gain = f"{1 - best['ms'] / current['ms']:.1%}"
            label = [f"{preset} {tokens:,} {dtype} {scenario}", field]
            values = [str(current["value"]), number(current["ms"]), str(best["value"]), number(best["ms"])]
            cells.append([*label, *values, gain])
    yield from table(["pass", "field", "the table's", "ms", "fastest", "ms", "gain"], cells)
    yield from _heights(rows)
    yield ""
    yield f'Proposal of the sweep for `tiles.CONFIGS["{family}"]`:'
    yield ""
    yield from ("```python", tile_table.as_text(numbers, entries), "```")
    decoding = tile_table.propose_decoding(rows)
    if decoding is not None:
        yield ""
        yield f'And for `tiles.DECODING["{family}"]`: `{decoding}`.'


def _heights(rows: Sequence[Row]) -> Iterator[str]:
    lines = [row for row in select(rows, part="sweep") if "both_ms" in row]
    if not lines:
        return
    heights = sorted({row["block_m"] for row in lines})
    yield ""
    yield "Time of forward, and of forward and backward, in ms, by the number of rows of a tile:"
    yield ""
    cells = []
    for count in dict.fromkeys(row["rows_per_expert"] for row in lines):
        by_height = {row["block_m"]: row for row in select(lines, rows_per_expert=count)}
        times = [
            number(by_height[height][name] if height in by_height else None)
            for name in ("forward_ms", "both_ms")
            for height in heights
        ]
        cells.append([number(count), *times])
    header = [f"{name}, {height} rows" for name in ("forward", "both") for height in heights]
    yield from table(["rows per expert", *header], cells)


def _text(lines: Iterable[str]) -> str:
    """Joins lines to a text, with an empty line after each heading."""
    return "\n".join(f"{line}\n" if line.startswith("## ") else line for line in lines)


def markdown(rows: Sequence[Row], figure: str | None = None) -> str:
    """Returns the page in Markdown.

    Args:
        rows: lines of results, see [`latest`].
        figure: address of a figure, relative to the page; None without one.
    """
    sections = [_text(section(rows)) for section in (targets, comparison, kernels, lora, memory, tiles)]
    picture = "" if figure is None else f"![Forward and backward at 32,768 tokens]({figure})"
    texts = [INTRODUCTION.strip(), sections[0], picture, *sections[1:], science_report.markdown(rows).strip()]
    texts += [_text(section(rows)) for section in (correctness, machine)]
    return "\n\n".join(text for text in texts if text) + "\n"
