# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts the kernels that Triton compiles or loads."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton


@contextmanager
def specialisations() -> Iterator[list[str]]:
    """Yields a list that receives a kernel's name each time that Triton needs a new specialisation of it.

    A specialisation is new if this process has not used it; it may be compiled or loaded from the cache on disk.
    """
    needed: list[str] = []

    def note(*, fn: Any, **_) -> None:
        needed.append(fn.name)

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield needed
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@contextmanager
def cache_use() -> Iterator[Counter[str]]:
    """Yields the number of kernels that were `"loaded"` from Triton's cache on disk, and of those `"compiled"`."""
    counts: Counter[str] = Counter(loaded=0, compiled=0)

    def note(*, cache_hit: bool, **_) -> None:
        counts["loaded" if cache_hit else "compiled"] += 1

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    try:
        yield counts
    finally:
        triton.knobs.compilation.listener = before
