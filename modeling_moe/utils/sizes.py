# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Messages write numbers of bytes as this module does, so that what is needed never reads like what is there."""


def size_text(count: int, up: bool = True) -> str:
    """A number of bytes in GB from a gigabyte on and in MiB below, with one decimal.

    Args:
        count: bytes, 0 or more.
        up: round up, as of what is needed; down, as of what is free.
    """
    unit, name = (10**9, "GB") if count >= 10**9 else (2**20, "MiB")
    tenths = -(-count * 10 // unit) if up else count * 10 // unit
    return f"{tenths // 10}.{tenths % 10} {name}"
