# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Messages give numbers of bytes in this format, in which a rounded need is never smaller than the true one."""


def size_text(count: int, up: bool = True) -> str:
    """Returns a number of bytes as text with one decimal: in GB (10^9 bytes) from 1 GB on, in MB (10^6 bytes) below.

    Args:
        count: number of bytes, 0 or more.
        up: whether to round up, for bytes that are needed, or down, for bytes that are free.
    """
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    tenths = -(-count * 10 // unit) if up else count * 10 // unit
    return f"{tenths // 10}.{tenths % 10} {name}"
