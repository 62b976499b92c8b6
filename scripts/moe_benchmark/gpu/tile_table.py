# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module proposes a tile table from part `sweep`, as the text of `CONFIGS` in modeling_moe's Triton tiles."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from modeling_moe.dispatch.backends.triton.tiles import CONFIGS, DECODING, Config, Decoding, Table, Tile

from .targets import select


Row = dict[str, Any]
# a tile is replaced only by one that is faster by more than the noise of measurements
GAIN = 0.02


def with_field(config: Config, field: str, value: Tile | bool) -> Config:
    """Returns a configuration with another value of one field."""
    return Config(**(config._asdict() | {field: value}))


def fields_swept(rows: Iterable[Row]) -> dict[tuple[str, int, str, str, str], list[Row]]:
    """Groups the measured lines by preset, tokens, dtype, scenario and field."""
    groups: dict[tuple[str, int, str, str, str], list[Row]] = {}
    for row in select(rows, part="sweep"):
        if "field" in row and "ms" in row:
            key = (row["preset"], row["tokens"], row["dtype"], row["scenario"], row["field"])
            groups.setdefault(key, []).append(row)
    return groups


def best_of(lines: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Returns the line of the table's own value, and the fastest line; each is None if it does not exist."""
    current = next((row for row in lines if row["current"]), None)
    return current, min(lines, key=lambda row: row["ms"], default=None)


def better(lines: Sequence[Row]) -> Row | None:
    """Returns the fastest line if it is faster than the table's own value by more than `GAIN`, else None."""
    current, best = best_of(lines)
    if current is None or best is None or best["ms"] > (1 - GAIN) * current["ms"]:
        return None
    return best


def propose_decoding(rows: Sequence[Row]) -> Decoding | None:
    """Returns the blocks with which decoding is fastest over all numbers of tokens; None if none were tried."""
    fields: dict[str, dict[int, Row]] = {}
    family = None
    for lines in fields_swept(select(rows, scenario="decode")).values():
        for row in lines:
            family, times = row["family"], fields.setdefault(row["field"], {})
            ms = row["ms"] + (times[row["value"]]["ms"] if row["value"] in times else 0.0)
            times[row["value"]] = row | {"ms": ms}
    if family is None:
        return None
    found = {field: best["value"] for field, times in fields.items() if (best := better([*times.values()]))}
    return DECODING[family]._replace(**found)


def numbers_of(dtype: str) -> str:
    """Returns the key of a dtype in a family's tables."""
    return dtype if dtype in ("float32", "tf32") else "16bit"


def crossover(rows: Iterable[Row]) -> float | None:
    """Returns the average rows per expert above which the higher of two tiles is faster in forward plus backward.

    Returns:
        The middle between the last measurement that the lower tile wins and the next one; infinity if it wins the
            last one;
        None if the higher tile wins all of them or nothing was measured, so that the bound is unknown.
    """
    by_rows: dict[float, dict[int, float]] = {}
    for row in select(rows, part="sweep"):
        if "both_ms" in row:
            by_rows.setdefault(row["rows_per_expert"], {})[row["block_m"]] = row["both_ms"]
    measured = sorted((count, times) for count, times in by_rows.items() if len(times) == 2)
    won = [times[min(times)] < times[max(times)] for _, times in measured]
    if True not in won:
        return None
    last = len(won) - 1 - won[::-1].index(True)
    return math.inf if last + 1 == len(won) else (measured[last][0] + measured[last + 1][0]) / 2


def propose(rows: Sequence[Row]) -> tuple[str, str, Table] | None:
    """Returns the family, the dtype key, and the table with all values that were measured to be faster; None
    without a sweep.
    """
    groups = fields_swept(rows)
    first = next((lines[0] for lines in groups.values() if lines[0]["scenario"] != "decode"), None)
    if first is None:
        return None
    family, numbers = first["family"], numbers_of(first["dtype"])
    table = list(CONFIGS[family][numbers])
    for key, lines in groups.items():
        best = better(lines)
        if best is None or lines[0]["scenario"] == "decode":
            continue
        place = next(number for number, (most, _) in enumerate(table) if lines[0]["rows_per_expert"] <= most)
        value = Tile(*best["value"]) if isinstance(best["value"], list) else best["value"]
        table[place] = (table[place][0], with_field(table[place][1], key[-1], value))
    bound = crossover(rows)
    if bound is not None and len(table) > 1:
        most = round(bound) if math.isfinite(bound) else table[-2][0]
        table[-2] = (max(most, table[-3][0] + 1 if len(table) > 2 else 1), table[-2][1])
    return family, numbers, table


def _tile(tile: Tile) -> str:
    """Returns the Python text of a tile, without default values."""
    given = [value for name, value in tile._asdict().items() if value != Tile._field_defaults.get(name, ())]
    return f"Tile({', '.join(map(str, given))})"


def as_text(numbers: str, table: Table) -> str:
    """Returns the Python text of the entry of a family's tables."""
    lines = [f'"{numbers}": [']
    for most, config in table:
        lines += ["    (", f"        {'math.inf' if math.isinf(most) else most},", "        Config("]
        for name in Config._fields:
            value = getattr(config, name)
            if value != Config._field_defaults.get(name):
                lines.append(f"            {name}={_tile(value) if isinstance(value, Tile) else value},")
        lines += ["        ),", "    ),"]
    return "\n".join([*lines, "],"])
