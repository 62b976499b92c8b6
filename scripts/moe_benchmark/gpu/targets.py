# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module states targets for the experts on one H200 at the shape of Qwen3-30B-A3B in bf16, and reads what was
measured.

# E 128 experts, H 2048 hidden, I 768 expert width, K 8 experts per token
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


Row = dict[str, Any]
PRESET = "qwen3_30b_a3b"


class Target(NamedTuple):
    """Describes one number to reach.

    Attributes:
        what: measured quantity.
        form: format of the number, with its unit.
        bound: bound of the number.
        at_least: whether the bound is a minimum; otherwise it is a maximum.
        find: function from the lines of a run to the number; None if it was not measured.
    """

    what: str
    form: str
    bound: float
    at_least: bool
    find: Callable[[Sequence[Row]], float | None]

    def cells(self, rows: Sequence[Row]) -> list[str]:
        """Returns the quantity, the bound, the measured number, and whether the target is met."""
        value, sign = self.find(rows), "at least" if self.at_least else "at most"
        bound = f"{sign} {self.form.format(self.bound)}"
        if value is None:
            return [self.what, bound, "-", "not measured"]
        met = value >= self.bound if self.at_least else value <= self.bound
        return [self.what, bound, self.form.format(value), "met" if met else "**not met**"]


def select(rows: Iterable[Row], **fields: Any) -> Iterable[Row]:
    """Returns the lines that have the given values."""
    return (row for row in rows if all(row.get(name) == value for name, value in fields.items()))


def case(rows: Iterable[Row], tokens: int, mode: str) -> Row | None:
    """Returns the line of a case of part `comparison` with balanced routing."""
    fields = {"preset": PRESET, "tokens": tokens, "mode": mode, "routing": "balanced"}
    return next((row for row in select(rows, part="comparison", **fields) if "ms" in row), None)


def _ms(tokens: int, mode: str) -> Callable[[Sequence[Row]], float | None]:
    def find(rows: Sequence[Row]) -> float | None:
        row = case(rows, tokens, mode)
        return None if row is None else row["ms"].get("moe")

    return find


def _speedup(tokens: int, mode: str) -> Callable[[Sequence[Row]], float | None]:
    def find(rows: Sequence[Row]) -> float | None:
        row = case(rows, tokens, mode)
        ratio = None if row is None else row["ratios"].get("ours/transformers")
        return None if ratio is None else 1 / ratio

    return find


def _peak(tokens: int) -> Callable[[Sequence[Row]], float | None]:
    def find(rows: Sequence[Row]) -> float | None:
        found = {
            row["implementation"]: row["peak_bytes"]
            for row in select(rows, part="memory", preset=PRESET, tokens=tokens)
            if "peak_bytes" in row
        }
        if not found.get("moe") or not found.get("grouped_mm"):
            return None
        return found["moe"] / found["grouped_mm"]

    return find


def _lora(tokens: int) -> Callable[[Sequence[Row]], float | None]:
    def find(rows: Sequence[Row]) -> float | None:
        lines = select(rows, part="lora", preset=PRESET, tokens=tokens)
        return next((row["lora_over_full"] for row in lines if "lora_over_full" in row), None)

    return find


def _decode(rows: Sequence[Row]) -> float | None:
    row = case(rows, 1, "decode")
    ratios = {} if row is None else row["ratios"]
    return ratios.get("ours/limit (graph)", ratios.get("ours/limit"))


PASSES = {"forward": "forward", "forward_backward": "forward and backward"}
LIMITS_MS = {
    (32768, "forward"): 5.0,
    (32768, "forward_backward"): 18.0,
    (4096, "forward"): 0.75,
    (4096, "forward_backward"): 2.4,
}
TARGETS = (
    *(
        Target(f"{PASSES[mode]}, {tokens:,} tokens", "{:.3g} ms", most, False, _ms(tokens, mode))
        for (tokens, mode), most in LIMITS_MS.items()
    ),
    *(
        Target(
            f"{PASSES[mode]}, {tokens:,} tokens, speed over grouped_mm", "{:.2f}", 1.2, True, _speedup(tokens, mode)
        )
        for tokens, mode in LIMITS_MS
    ),
    Target("peak memory with backward, 32,768 tokens, over grouped_mm", "{:.2f}", 0.3, False, _peak(32768)),
    *(
        Target(f"LoRA of rank 16 over full fine-tuning, {tokens:,} tokens", "{:.2f}", 1.0, False, _lora(tokens))
        for tokens in (32768, 4096)
    ),
    Target("decoding of 1 token over bytes / bandwidth", "{:.2f}", 1.5, False, _decode),
)
