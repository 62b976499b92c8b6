# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes tables of results, at most 100 columns wide."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .contestants import COPY, GRAPH, LOGGED, OURS, PEFT, WHOLE
from .results import Comparison, Result


SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FAILED = "FAILED"


def _table(texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Returns a table with columns of text, then columns of numbers, one space apart."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for header in texts:
        table.add_column(header)
    for header in numbers:
        table.add_column(header, justify="right")
    return table


def _cell(value: float | None, form: str = "{:.3g}") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else form.format(value)


def _ratio(value: float | None) -> str:
    return _cell(value, "{:.3f}" if value is not None and value < 0.1 else "{:.2f}")


def _scaled(value: int | None, unit: int) -> str:
    return _cell(None if value is None else value / unit)


def _ms(result: Result, name: str) -> str:
    failed = {name, "all"} & set(result.failures)
    return FAILED if failed else _cell(result.median(name))


def case_table(result: Result) -> Table:
    """Returns a table with a line for each contestant: median, ratio of this package to it, its ratio to limits,
    memory.
    """
    names = [name for name in result.times if name != COPY]
    floors = bool(result.floors_ms)
    numbers = ["ms", "ours / it", *["it / limit"] * (result.limit_ms is not None), *["it / roofline"] * floors]
    table = _table(["contestant"], [*numbers, *["saved MiB"] * bool(result.saved_bytes), *_peak(result)])
    for name in [*names, *(name for name in result.failures if name not in names)]:
        row = [_ms(result, name), _ratio(result.over_ours(name))]
        if result.limit_ms is not None:
            row.append(_ratio(result.over_limit(name)))
        if floors:
            row.append(_ratio(result.over_floor(name)))
        if result.saved_bytes:
            row.append(_scaled(result.saved_bytes.get(name), 2**20))
        if result.peak_bytes:
            row.append(_scaled(result.peak_bytes.get(name), 2**30))
        table.add_row(escape(name), *row)
    return table


def _peak(result: Result) -> list[str]:
    return ["peak GiB"] if result.peak_bytes else []


def mode_table(results: Sequence[Result]) -> Table:
    """Returns a table with this package's ratios to others: a line for each case, and one for its CUDA graph."""
    ratios = {
        "transformers": "trans-\nformers",
        "limit": "limit",
        "roofline": "roof-\nline",
        "saved": "saved",
        "peak": "peak",
    }
    shown = [
        name for name in ratios if any(name in _ratios(result, "") | _ratios(result, GRAPH) for result in results)
    ]
    table = _table(["preset", "dtype", "T", "routing", "as"], ["ms", *(ratios[name] for name in shown)])
    for result in results:
        case = result.case
        for suffix in ("", GRAPH):
            name = f"{result.ours or OURS}{suffix}"
            if suffix and name not in result.times and name not in result.failures:
                continue
            found = _ratios(result, suffix)
            label = [case.preset, SHORT[case.dtype], f"{case.tokens}", case.routing, name]
            table.add_row(*map(escape, label), _ms(result, name), *(_ratio(found.get(ratio)) for ratio in shown))
    return table


def _ratios(result: Result, suffix: str) -> dict[str, float]:
    """Returns this package's ratios, with `suffix=GRAPH` those of its CUDA graph, by the headers of `mode_table`."""
    ratios = result.ratios()
    found = {name: ratios.get(f"ours/{name}{suffix}") for name in ("transformers", "limit")}
    if result.ours is not None:
        found["roofline"] = result.over_floor(f"{result.ours}{suffix}")
    if not suffix:
        found |= {name: ratios.get(f"{name}/grouped_mm") for name in ("saved", "peak")}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def lora_table(results: Sequence[Result]) -> Table:
    """Returns a table with the ratios of this package's LoRA on experts to others, a line for each case."""
    others = list(dict.fromkeys(name for result in results for name in result.times if name != OURS))
    headers = ["ms", *(name.replace(", ", ",\n") for name in others), f"saved/\n{PEFT}", f"peak/\n{PEFT}"]
    table = _table(["preset", "dtype", "T"], headers)
    for result in results:
        case, ratios = result.case, result.ratios()
        names = [*(f"ours/{name}" for name in others), f"saved/{PEFT}", f"peak/{PEFT}"]
        cells = [_ms(result, OURS), *(_ratio(ratios.get(name)) for name in names)]
        table.add_row(escape(case.preset), SHORT[case.dtype], f"{case.tokens}", *cells)
    return table


def watching_table(results: Sequence[Result]) -> Table:
    """Returns a table with the time of training with the routing logged over that without, a line for each case."""
    headers = [f"logged /\n{alone}" for alone in LOGGED.values()]
    table = _table(["preset", "dtype", "T"], [f"ms,\n{next(iter(LOGGED.values()))}", *headers])
    for result in results:
        case, ratios = result.case, result.ratios()
        cells = [_cell(ratios.get(f"logged/{alone}"), "{:.3f}") for alone in LOGGED.values()]
        table.add_row(escape(case.preset), SHORT[case.dtype], f"{case.tokens}", _ms(result, LOGGED[OURS]), *cells)
    return table


def offload_table(results: Sequence[Result]) -> Table:
    """Returns a table with the time of a token when the experts are on disk, over others, a line for each case."""
    names = ("slots for all/whole", "quarter/whole", "Accelerate/quarter")
    headers = [name.replace("/", " /\n") for name in names]
    table = _table(["preset", "dtype"], [f"ms,\n{WHOLE}", *headers, "loads / fewest,\nZipf"])
    for result in results:
        ratios = result.ratios()
        cells = [_ratio(ratios.get(name)) for name in names]
        table.add_row(
            escape(result.case.preset),
            SHORT[result.case.dtype],
            _ms(result, WHOLE),
            *cells,
            _ratio(result.loads.get("Zipf")),
        )
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Returns a table with a line for each compared case."""
    table = _table(["case", "against"], ["ratio"])
    for comparison in comparisons:
        table.add_row(str(comparison.case), _differing(comparison), f"{comparison.ratio:.2f}")
    return table


def _differing(comparison: Comparison) -> str:
    """Returns the property in which the base differs from the case."""
    same_preset = comparison.case.preset == comparison.base.preset
    return comparison.base.routing if same_preset else comparison.base.preset
