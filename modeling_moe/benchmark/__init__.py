# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of the experts against transformers' own implementations and against what is possible."""

from .arguments import BenchmarkArguments
from .cases import Case
from .check import Disagreement
from .lora import LORA_ROUNDS, compare_lora, print_lora
from .report import machine_facts, print_report, write_json
from .results import Result
from .runner import Runner


__all__ = [
    "BenchmarkArguments",
    "Case",
    "Disagreement",
    "LORA_ROUNDS",
    "Result",
    "Runner",
    "compare_lora",
    "machine_facts",
    "print_lora",
    "print_report",
    "write_json",
]
