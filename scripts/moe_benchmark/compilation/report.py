# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reports compiled launches, as a table on the terminal and as a page of documentation."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

import triton
from rich.console import Console
from rich.table import Table

from .calls import SCENARIOS
from .compiling import TARGETS, Code


def print_table(codes: Iterable[Code]) -> None:
    """Prints a line for each code."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table("GPU", "kernel", "tile", "registers", "spills", "in loop", "KiB", "products by", "lines", "calls")
    for code in codes:
        numbers = (code.registers, code.spills, code.loop_spills, f"{code.shared / 1024:.1f}")
        calls = code.uses[0] + (f" and {len(code.uses) - 1} more" if len(code.uses) > 1 else "")
        products = ", ".join(code.instructions) or "-"
        table.add_row(code.target, code.kernel, code.tile, *map(str, numbers), products, str(code.lines), calls)
    console.print(table)


PAGE = """# Machine code of the Triton kernels

This page shows the machine code of the launches that the Triton back end chooses for the presets of
`scripts/moe_benchmark/presets.py` in bfloat16: for training, inference and decoding, and for LoRA of two of them, with
numbers of tokens that reach each tile. Triton {triton} compiled it on a machine without a GPU, by

```
python -m moe_benchmark.compilation --markdown docs/gpu-kernels.md
```

Each line shows a kernel with one tile: BLOCK_M x BLOCK_N x BLOCK_K, warps and stages. It covers all compiled versions of
the kernel, with the smallest and the largest number of each column. If registers do not suffice, the compiler spills them
to memory: *spills* counts these loads and stores in the whole code, *in loop* those in the loop over the products, which
must be 0. A product of 64 rows or more must use matrix instructions, except in float32 at full precision.
`tests/dispatch/test_compilation.py` checks these rules and the shared memory for more dtypes and edge cases.
"""
COLUMNS = ("kernel", "tile", "versions", "registers", "spills", "in loop", "shared KiB", "products by", "instructions")


def _span(values: Iterable[float]) -> str:
    least, greatest = min(values := [*values]), max(values)
    return f"{least:g}" if least == greatest else f"{least:g} - {greatest:g}"


def markdown(codes: Sequence[Code]) -> str:
    """Returns a Markdown page with a table for each target, which has a line for each kernel and tile."""
    text = PAGE.format(triton=triton.__version__)
    for target in dict.fromkeys(code.target for code in codes):
        shared = TARGETS[target].shared
        text += f"\n## {target}\n\nA program may have {shared} KiB of shared memory.\n\n"
        text += f"| {' | '.join(COLUMNS)} | passes |\n|{'---|' * (len(COLUMNS) + 1)}\n"
        lines: dict[tuple[str, str], list[Code]] = defaultdict(list)
        for code in codes:
            if code.target == target:
                lines[code.kernel, code.tile].append(code)
        for (kernel, tile), versions in sorted(lines.items()):
            numbers = [[getattr(code, name) for code in versions] for name in ("registers", "spills", "loop_spills")]
            spans = [*map(_span, numbers), _span(round(code.shared / 1024, 1) for code in versions)]
            products = sorted({each for code in versions for each in code.instructions})
            passes = {use.rsplit(" ", 1)[1] for code in versions for use in code.uses}
            cells = [kernel, tile or "-", str(len(versions)), *spans, ", ".join(products) or "-"]
            cells += [_span(code.lines for code in versions), ", ".join(name for name in SCENARIOS if name in passes)]
            text += f"| {' | '.join(cells)} |\n"
    return text
