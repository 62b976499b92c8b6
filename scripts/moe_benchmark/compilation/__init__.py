# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package compiles the Triton back end's launches ahead of time, for GPUs that need not be present.

`record` returns the launches of a [`Call`], `precompile` fills Triton's cache with them, `compile_all` analyses their
code. `python -m moe_benchmark.compilation --help` describes the command.
"""

from .calls import Call, Experts, preset_calls, preset_experts
from .compiling import TARGETS, Code, collect, compile_all, distinct, faults, precompile
from .recording import record


__all__ = [
    "TARGETS",
    "Call",
    "Code",
    "Experts",
    "collect",
    "compile_all",
    "distinct",
    "faults",
    "precompile",
    "preset_calls",
    "preset_experts",
    "record",
]
