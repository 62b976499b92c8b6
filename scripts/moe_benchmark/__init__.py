# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package measures speed and memory of the experts against transformers' own implementations and limits."""

from .arguments import BenchmarkArguments
from .cases import Case
from .facts import machine_facts
from .lora import LoraRunner
from .offload import OffloadRunner
from .report import Report
from .results import Result
from .runner import Runner
from .watching import WatchingRunner


__all__ = [
    "BenchmarkArguments",
    "Case",
    "LoraRunner",
    "OffloadRunner",
    "Report",
    "Result",
    "Runner",
    "WatchingRunner",
    "machine_facts",
]
