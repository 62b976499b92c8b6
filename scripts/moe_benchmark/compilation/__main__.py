# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command compiles the Triton back end's launches for GPUs that need not be there, and judges their code.

    python -m moe_benchmark.compilation --part small
    python -m moe_benchmark.compilation --targets sm_90 --presets olmoe --tokens 4096 --scenarios train lora
    python -m moe_benchmark.compilation --targets sm_90 --presets olmoe --tiles gate=128,256,64,8,3
    python -m moe_benchmark.compilation --markdown docs/gpu-kernels.md
    python -m moe_benchmark.compilation --part all

The back end runs on meta tensors, where its launches are recorded instead of run. Triton's bundled compilers then make
each different one, and its disassemblers show the machine code. The exit code is 1 if a launch does not compile, takes
more shared or tensor memory than the GPU has, spills registers in the loop over its products, or multiplies without
matrix instructions what these could multiply. It needs Triton on Linux, with TRITON_INTERPRET unset, and no GPU.

# T tokens, K experts per token, E experts, H hidden, I expert width, C = I or 2I columns, R rank
"""

import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from modeling_moe.dispatch.backends.triton import tiles
from modeling_moe.dispatch.backends.triton.backend import INTERPRETED
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError

from ..presets import PRESETS
from .calls import KINDS, PARTS, SCENARIOS, Call, part_calls, preset_calls
from .compiling import TARGETS, USUAL_TARGETS, Code, collect, compile_all, faults
from .report import markdown, print_table


@dataclass
class CompilationArguments:
    """These arguments choose the calls to compile: a named part, or calls by presets, dtypes, tokens and scenarios."""

    part: str = field(default="presets", metadata={"help": "small, presets, or all, which adds dtypes and edge cases"})
    targets: list[str] = field(
        default_factory=lambda: list(USUAL_TARGETS), metadata={"help": f"GPUs: {', '.join(TARGETS)}"}
    )
    presets: list[str] = field(default_factory=list, metadata={"help": "shapes to compile instead of a part"})
    tokens: list[int] = field(default_factory=list, metadata={"help": "numbers of tokens of a call of --presets"})
    dtypes: list[str] = field(default_factory=list, metadata={"help": f"{', '.join(KINDS)}; without it bfloat16"})
    scenarios: list[str] = field(default_factory=list, metadata={"help": ", ".join(SCENARIOS)})
    tiles: list[str] = field(
        default_factory=list, metadata={"help": "changes of the tiles: gate=128,256,64,8,3 or persistent=1"}
    )
    jobs: int = field(default=os.cpu_count() or 1, metadata={"help": "processes that compile"})
    json: str | None = field(default=None, metadata={"help": "JSON file for all results"})
    markdown: str | None = field(default=None, metadata={"help": "Markdown file for a page with the table"})

    def __post_init__(self):
        known: dict[str, tuple[Sequence[str], Collection[str]]] = {
            "part": ([self.part], PARTS),
            "targets": (self.targets, TARGETS),
            "presets": (self.presets, PRESETS),
            "dtypes": (self.dtypes, KINDS),
            "scenarios": (self.scenarios, SCENARIOS),
        }
        for name, (values, choices) in known.items():
            for value in values:
                if value not in choices:
                    raise UserError(f"{name} {value!r} is unknown: it must be one of {', '.join(choices)}")
        if min([self.jobs, *self.tokens]) < 1:
            raise UserError("jobs and tokens must be positive")
        if not self.presets and (self.tokens or self.dtypes or self.scenarios):
            raise UserError("tokens, dtypes and scenarios need presets: give --presets")
        self.changes = dict(map(_change, self.tiles))

    def calls(self, target: str) -> list[Call]:
        """Returns the calls for a target."""
        family = TARGETS[target].family
        if self.presets:
            chosen = (self.presets, self.dtypes or ["bfloat16"], self.scenarios or [*SCENARIOS])
            return [*preset_calls(family, *chosen, self.tokens)]
        return part_calls(self.part, family)


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name == "persistent" and value in ("0", "1"):
        return name, value == "1"
    numbers = value.split(",")
    if name not in tiles.Config._fields or len(numbers) not in (5, 6) or not all(map(str.isdigit, numbers)):
        raise UserError(f"tiles {text!r} is malformed: write FIELD=BLOCK_M,BLOCK_N,BLOCK_K,warps,stages[,maxnreg]")
    return name, tiles.Tile(*map(int, numbers))


def _compile(args: CompilationArguments, target: str) -> Iterator[Code]:
    launches, uses = collect(args.calls(target), target, args.changes)
    codes = track(compile_all(launches, target, args.jobs), target, len(launches), console=Console(stderr=True))
    for code, names in zip(codes, uses, strict=True):
        yield replace(code, uses=names)


def main() -> None:
    """Compiles, prints and writes what was asked for; the exit code is 1 if anything is at fault."""
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: unset it, interpreted kernels are not compiled")
    (args,) = parse([CompilationArguments], __doc__)
    codes = [code for target in args.targets for code in _compile(args, target)]
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(code) for code in codes], indent=1) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(markdown(codes))
    print_table(codes)
    found = [fault for code in codes for fault in faults(code)]
    print("\n".join(found or [f"{len(codes)} launches compiled without a fault"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    run(main)
