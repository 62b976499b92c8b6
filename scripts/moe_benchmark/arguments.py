# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a user can ask the benchmark for."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_moe.utils.errors import UserError

from .cases import LEVELS, MODES, Case, default_cases, lora_cases, make_cases
from .contestants import IMPLEMENTATIONS, is_known, is_ours
from .presets import PRESETS
from .routing import ROUTINGS


WHAT = ("experts", "lora")
DTYPES = ("float32", "bfloat16", "float16")
# seconds: of a whole run, and of a case without its checks
BUDGET_S = {"cpu": 720.0, "cuda": 450.0}
CASE_S = {"cpu": 10.0, "cuda": 2.0}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class BenchmarkArguments:
    """Without presets, tokens, dtypes, routing or modes the device's usual cases are measured.

    Raises:
        UserError: for what is unknown, impossible, or contradicts itself.
    """

    device: str = field(default="cpu", metadata=_help("cpu or cuda"))
    what: str = field(default="experts", metadata=_help("experts, or lora: LoRA on experts against PEFT's own"))
    level: str = field(default="experts", metadata=_help("experts, block (with its router) or model (two layers)"))
    presets: list[str] = field(default_factory=list, metadata=_help(f"shapes: {', '.join(PRESETS)}"))
    tokens: list[int] = field(default_factory=list, metadata=_help("tokens of a call; without --modes, <= 16 decode"))
    dtypes: list[str] = field(default_factory=list, metadata=_help(", ".join(DTYPES)))
    routing: list[str] = field(default_factory=list, metadata=_help(f"{', '.join(ROUTINGS)}; at --level experts"))
    modes: list[str] = field(default_factory=list, metadata=_help(", ".join(MODES)))
    implementations: list[str] = field(
        default_factory=lambda: list(IMPLEMENTATIONS),
        metadata=_help("names in transformers' experts interface, eager, or moe_recompute"),
    )
    rounds: int | None = field(default=None, metadata=_help("turns of each contestant; as many as fit in --case_s"))
    case_s: float | None = field(default=None, metadata=_help("seconds measured per case: 10 on cpu, 2 on cuda"))
    budget_s: float | None = field(default=None, metadata=_help("seconds of the run: 720 on cpu, 450 on cuda"))
    threads: int | None = field(default=None, metadata=_help("CPU threads; torch's own choice"))
    cuda_graphs: bool = field(default=True, metadata=_help("on cuda, measure decoding as CUDA graphs too"))
    output: str | None = field(default=None, metadata=_help("JSON file, whole and up to date after each case"))

    def __post_init__(self):
        mistake = next(self._mistakes(), None)
        if mistake is not None:
            raise UserError(mistake)
        self.case_s = self.case_s or CASE_S[self.device]
        self.budget_s = self.budget_s or BUDGET_S[self.device]

    def _mistakes(self) -> Iterator[str]:
        yield from _unknown("device", [self.device], BUDGET_S)
        yield from _unknown("what", [self.what], WHAT)
        yield from _unknown("level", [self.level], LEVELS)
        yield from _unknown("presets", self.presets, PRESETS)
        yield from _unknown("dtypes", self.dtypes, DTYPES)
        yield from _unknown("routing", self.routing, ROUTINGS)
        yield from _unknown("modes", self.modes, MODES)
        if self.what == "lora" and (self.routing or self.modes or self.level != "experts"):
            yield "what lora measures forward and backward of a model with its router: leave routing, modes, level out"
        for name in ("rounds", "case_s", "budget_s", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"{name} is {value}: it must be positive"
        if min(self.tokens, default=1) < 1:
            yield f"tokens: {min(self.tokens)} is less than 1"
        if self.routing and self.level != "experts":
            yield f"routing: at level {self.level} a router chooses, leave it out"
        yield from self._impossible()

    def _impossible(self) -> Iterator[str]:
        for preset in self.presets:
            if PRESETS[preset].family != "gated" and (self.level != "experts" or self.what == "lora"):
                yield f"presets: {preset} has experts only, measure it at level experts, without lora"
        unknown = [name for name in self.implementations if not is_known(name)]
        if unknown:
            yield f"implementations: {unknown[0]!r} is not registered with transformers"
        if not any(is_ours(name) for name in self.implementations):
            yield "implementations: at least one must be this package's, moe for instance"
        folder = Path(self.output or ".").parent
        if not folder.is_dir():
            yield f"output {self.output}: make the folder {folder} first"
        if self.device == "cuda" and not torch.cuda.is_available():
            yield "device cuda: torch sees no GPU here"

    def cases(self) -> list[Case]:
        """What is to be measured, the most important first."""
        if self.what == "lora":
            return lora_cases(self.device, self.presets, self.dtypes, self.tokens)
        asked = (self.presets, self.dtypes, self.tokens, self.routing, self.modes)
        return make_cases(self.device, self.level, *asked) if any(asked) else default_cases(self.device, self.level)


def _unknown(name: str, values: Collection[str], known: Collection[str]) -> Iterator[str]:
    for value in values:
        if value not in known:
            yield f"{name} {value!r} is unknown: it must be one of {', '.join(known)}"
