# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of the experts against transformers' own implementations and against what is possible."""

from .arguments import BenchmarkArguments
from .cases import Case
from .check import Disagreement
from .report import machine_facts, print_report, write_json
from .results import Result
from .runner import Runner


__all__ = [
    "BenchmarkArguments",
    "Case",
    "Disagreement",
    "Result",
    "Runner",
    "machine_facts",
    "print_report",
    "write_json",
]
