# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Messages give numbers of bytes in one format, in which a rounded need is never smaller than the true one, and budgets
are read from text.
"""

import re


def size_text(count: int, up: bool = True) -> str:
    """Returns a number of bytes as text with one decimal: in GB (10^9 bytes) from 1 GB on, in MB (10^6 bytes) below.

    Args:
        count: number of bytes, 0 or more.
        up: whether to round up, for bytes that are needed, or down, for bytes that are free.
    """
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    tenths = -(-count * 10 // unit) if up else count * 10 // unit
    return f"{tenths // 10}.{tenths % 10} {name}"


_UNITS = {"B": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def parse_size(given: int | str, field: str) -> int:
    """Returns a number of bytes that was given as a number, or as text such as `"4GiB"` (2^30 bytes) or `"500MB"`.

    Args:
        given: the number or the text.
        field: what the number is for, named in the message.

    Raises:
        ValueError: if it is no size.
    """
    if type(given) is int:
        return given
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", given) if isinstance(given, str) else None
    unit = _UNITS.get(match[2].upper() or "B") if match else None
    if match is None or unit is None:
        raise ValueError(f"{field}={given!r} is no size: write a number of bytes, or one with a unit such as '4GiB'")
    return int(float(match[1]) * unit)
