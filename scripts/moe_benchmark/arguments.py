# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the arguments of the benchmark."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_moe.utils.errors import UserError

from .cases import LEVELS, MODES, Case, default_cases, lora_cases, make_cases, offload_cases, watching_cases
from .contestants import IMPLEMENTATIONS, is_known, is_ours
from .presets import PRESETS
from .routing import ROUTINGS


WHAT = ("experts", "lora", "watching", "offload")
DTYPES = ("float32", "bfloat16", "float16")
# seconds of a whole run, and seconds of timing in a case
BUDGET_S = {"cpu": 720.0, "cuda": 450.0}
CASE_S = {"cpu": 10.0, "cuda": 2.0}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class BenchmarkArguments:
    """These arguments choose the cases; without presets, tokens, dtypes, routing and modes the device's default
    cases run.

    Raises:
        UserError: if a value is unknown, impossible, or contradicts another one.
    """

    device: str = field(default="cpu", metadata=_help("cpu or cuda"))
    what: str = field(
        default="experts",
        metadata=_help(
            "experts, lora: LoRA on experts against PEFT's own code, watching: the cost of logging the routing, or offload: "
            "decoding with the experts on disk"
        ),
    )
    level: str = field(default="experts", metadata=_help("experts, block (with its router) or model (two layers)"))
    presets: list[str] = field(default_factory=list, metadata=_help(f"shapes: {', '.join(PRESETS)}"))
    tokens: list[int] = field(
        default_factory=list,
        metadata=_help("numbers of tokens of a call; without --modes, calls of at most 16 tokens decode"),
    )
    dtypes: list[str] = field(default_factory=list, metadata=_help(", ".join(DTYPES)))
    routing: list[str] = field(default_factory=list, metadata=_help(f"{', '.join(ROUTINGS)}; at --level experts"))
    modes: list[str] = field(default_factory=list, metadata=_help(", ".join(MODES)))
    implementations: list[str] = field(
        default_factory=lambda: list(IMPLEMENTATIONS),
        metadata=_help("names in transformers' experts interface, or eager, or moe_recompute"),
    )
    rounds: int | None = field(
        default=None, metadata=_help("number of rounds; without it as many as fit into --case_s")
    )
    case_s: float | None = field(default=None, metadata=_help("seconds of timing in a case; 10 on cpu, 2 on cuda"))
    budget_s: float | None = field(default=None, metadata=_help("seconds of the run; 720 on cpu, 450 on cuda"))
    threads: int | None = field(default=None, metadata=_help("number of CPU threads; without it torch's default"))
    cuda_graphs: bool = field(default=True, metadata=_help("measure decoding also as CUDA graphs, on cuda"))
    output: str | None = field(default=None, metadata=_help("JSON file for the results, complete after each case"))

    def __post_init__(self):
        mistake = next(self._mistakes(), None)
        if mistake is not None:
            raise UserError(mistake)

    @property
    def seconds_of_case(self) -> float:
        """Seconds of timing in a case: `case_s`, or the device's default."""
        return self.case_s or CASE_S[self.device]

    @property
    def seconds_of_run(self) -> float:
        """Seconds of the run: `budget_s`, or the device's default."""
        return self.budget_s or BUDGET_S[self.device]

    def _mistakes(self) -> Iterator[str]:
        yield from _unknown("device", [self.device], BUDGET_S)
        yield from _unknown("what", [self.what], WHAT)
        yield from _unknown("level", [self.level], LEVELS)
        yield from _unknown("presets", self.presets, PRESETS)
        yield from _unknown("dtypes", self.dtypes, DTYPES)
        yield from _unknown("routing", self.routing, ROUTINGS)
        yield from _unknown("modes", self.modes, MODES)
        if self.what != "experts" and (self.routing or self.modes or self.level != "experts"):
            yield f"what: {self.what} measures a model with its router, in its own modes; omit routing, modes and level"
        if self.what == "offload" and (self.tokens or self.device != "cpu"):
            yield "what: offload decodes one text on the CPU; omit tokens and device"
        for name in ("rounds", "case_s", "budget_s", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"{name} is {value}: it must be positive"
        if min(self.tokens, default=1) < 1:
            yield f"tokens is {min(self.tokens)}: it must be at least 1"
        if self.routing and self.level != "experts":
            yield f"routing: at level {self.level} a router chooses the experts; omit routing"
        yield from self._impossible()

    def _impossible(self) -> Iterator[str]:
        for preset in self.presets:
            if PRESETS[preset].family != "gated" and (self.level != "experts" or self.what != "experts"):
                yield f"presets: {preset} has only experts; measure it at level experts, with --what experts"
        unknown = [name for name in self.implementations if not is_known(name)]
        if unknown:
            yield f"implementations: {unknown[0]!r} is not registered with transformers"
        if not any(is_ours(name) for name in self.implementations):
            yield "implementations: at least one must belong to this package, such as moe"
        folder = Path(self.output or ".").parent
        if not folder.is_dir():
            yield f"output {self.output}: make the folder {folder} first"
        if self.device == "cuda" and not torch.cuda.is_available():
            yield "device cuda: torch finds no GPU; use cpu"

    def cases(self) -> list[Case]:
        """Returns the cases to measure, the most important first."""
        if self.what == "lora":
            return lora_cases(self.device, self.presets, self.dtypes, self.tokens)
        if self.what == "offload":
            return offload_cases(self.presets, self.dtypes)
        if self.what == "watching":
            return watching_cases(self.device, self.presets, self.dtypes, self.tokens)
        asked = (self.presets, self.dtypes, self.tokens, self.routing, self.modes)
        return make_cases(self.device, self.level, *asked) if any(asked) else default_cases(self.device, self.level)


def _unknown(name: str, values: Collection[str], known: Collection[str]) -> Iterator[str]:
    for value in values:
        if value not in known:
            yield f"{name} {value!r} is unknown: it must be one of {', '.join(known)}"
