# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lists the calls of the Triton back end whose launches are compiled: presets and edge cases, in all
scenarios.

# T tokens, K experts per token, E experts, H hidden, I expert width, R rank
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from modeling_moe.dispatch.activations import ACTIVATIONS
from modeling_moe.dispatch.backends.triton import tiles

from ..presets import GPU_PRESETS, PRESETS


# dtype of a call -> key of the tables of tiles
KINDS = {"bfloat16": "16bit", "float16": "16bit", "float32": "float32", "tf32": "tf32"}
PARTS = ("small", "presets", "all")


class Experts(NamedTuple):
    """Describes the experts of one layer.

    Attributes:
        hidden: the width H of a token.
        width: the width I of an expert.
        number: the number E of experts.
        per_token: the number K of a token's experts.
        gate: a key of [`~modeling_moe.dispatch.activations.ACTIVATIONS`].
        bias: whether both matrices have biases.
        transposed: whether the matrices have gpt-oss's memory layout, (E, H, C) and (E, I, H).
    """

    hidden: int
    width: int
    number: int
    per_token: int
    gate: str = "silu_gated"
    bias: bool = False
    transposed: bool = False


class Scenario(NamedTuple):
    """Describes which passes run, and with which inputs.

    Attributes:
        keep: whether forward keeps h; None if no forward runs.
        stored: whether backward receives h; None if no backward runs.
        frozen: whether the matrices and biases have no gradients.
        rank: rank R of the low-rank updates; 0 for none.
        updated: the matrices with an update.
        dropout: whether the updates have dropout. Factors then have the dtype of the tokens, as in PEFT with
            `autocast_adapter_dtype=False`; otherwise they are float32.
        mixed: whether matrices and biases are float32 whatever the tokens' dtype, as under autocast.
    """

    keep: bool | None = None
    stored: bool | None = None
    frozen: bool = False
    rank: int = 0
    updated: tuple[str, ...] = ("up", "down")
    dropout: bool = False
    mixed: bool = False


SCENARIOS = {
    "train": Scenario(keep=True, stored=True),
    "autocast": Scenario(keep=True, stored=True, mixed=True),
    "infer": Scenario(keep=False),
    "recompute": Scenario(keep=False, stored=False),
    "frozen": Scenario(stored=True, frozen=True),
    "lora": Scenario(keep=True, stored=True, frozen=True, rank=16),
    "lora_dropout": Scenario(keep=True, stored=True, frozen=True, rank=16, dropout=True),
    "lora_infer": Scenario(keep=False, rank=16),
    "lora_recompute": Scenario(keep=False, stored=False, frozen=True, rank=16),
    "lora_up": Scenario(keep=True, stored=True, rank=20, updated=("up",)),
    "lora_down": Scenario(keep=True, stored=True, rank=20, updated=("down",)),
    "lora_wide": Scenario(keep=True, stored=True, frozen=True, rank=128),
    "decode": Scenario(),
    "routing": Scenario(),
}


class Call(NamedTuple):
    """Describes one call of the Triton back end.

    Attributes:
        name: name of the layer in tables.
        experts: the layer.
        tokens: number of tokens T.
        dtype: `"bfloat16"`, `"float16"`, `"float32"` or `"tf32"`: float32 that is rounded to TF32 in products.
        scenario: key of `SCENARIOS`.
    """

    name: str
    experts: Experts
    tokens: int
    dtype: str
    scenario: str

    def __str__(self) -> str:
        return f"{self.name} T={self.tokens} {self.dtype} {self.scenario}"


def preset_experts(name: str) -> Experts:
    """Returns the layer of a preset, a key of [`~moe_benchmark.presets.PRESETS`]."""
    preset = PRESETS[name]
    sizes = (preset.hidden, preset.intermediate, preset.experts, preset.per_token)
    if preset.family == "gpt_oss":
        return Experts(*sizes, gate="clamped_swiglu_pairs", bias=True, transposed=True)
    return Experts(*sizes)


def _bucket_tokens(experts: Experts, family: str, dtype: str) -> list[int]:
    """Returns numbers of tokens that reach each configuration of the family."""
    tokens, rows = [], 0.0
    for most, _ in tiles.CONFIGS[family][KINDS[dtype]]:
        rows = most if most < float("inf") else max(2 * rows, 1024)
        tokens.append(max(1, int(rows * experts.number / experts.per_token)))
    return tokens


def preset_calls(
    family: str, presets: Iterable[str], dtypes: Iterable[str], scenarios: Iterable[str], tokens: Sequence[int] = ()
) -> Iterator[Call]:
    """Yields the calls of presets.

    Args:
        family: key of [`~modeling_moe.dispatch.backends.triton.tiles.CONFIGS`].
        presets: keys of [`~moe_benchmark.presets.PRESETS`].
        dtypes: dtypes of a [`Call`]; tf32 is omitted if the family has no tiles for it.
        scenarios: keys of `SCENARIOS`.
        tokens: numbers of tokens. If empty, decode has 1 and 16, and other scenarios have numbers that reach each of
            the family's configurations.
    """
    for preset in presets:
        experts = preset_experts(preset)
        for dtype in (name for name in dtypes if KINDS[name] in tiles.CONFIGS[family]):
            for scenario in scenarios:
                usual = _bucket_tokens(experts, family, dtype)
                for number in tokens or ((1, 16) if scenario == "decode" else usual):
                    yield Call(preset, experts, number, dtype, scenario)


EDGES = {
    "one expert, one token": (Experts(64, 32, 1, 1), 1),
    "one token, odd widths": (Experts(10, 7, 3, 2, bias=True), 1),
    "odd widths": (Experts(70, 37, 3, 2, bias=True), 5),
    "odd widths, transposed pairs": (Experts(70, 37, 3, 1, "clamped_swiglu_pairs", bias=True, transposed=True), 5),
    "widths of 1": (Experts(1, 1, 2, 1, "gelu", bias=True), 3),
    "many rows, odd widths": (Experts(1000, 333, 2, 2, bias=True), 4096),
    "transposed, even": (Experts(1024, 512, 8, 2, transposed=True), 4096),
    "many experts": (Experts(256, 128, 1024, 8), 4096),
}
EDGE_SCENARIOS = {
    "bfloat16": ("train", "autocast", "recompute", "lora", "decode", "routing"),
    "float32": ("train", "lora", "decode"),
}


def edge_calls() -> Iterator[Call]:
    """Yields calls with one expert, one token, odd widths or transposed matrices, and calls of each gate."""
    for name, (experts, tokens) in EDGES.items():
        for dtype, scenarios in EDGE_SCENARIOS.items():
            for scenario in scenarios:
                yield Call(name, experts, min(tokens, 16) if scenario == "decode" else tokens, dtype, scenario)
    for gate in ACTIVATIONS:
        experts = Experts(256, 128, 4, 2, gate, bias=True)
        yield Call(f"gate {gate}", experts, 2048, "bfloat16", "train")
        yield Call(f"gate {gate}", experts, 16, "bfloat16", "decode")


def part_calls(part: str, family: str) -> list[Call]:
    """Returns the calls of a part.

    Args:
        part: `"small"`, a few calls of one preset; `"presets"`, the usual calls of each preset in bfloat16; or
            `"all"`, which adds the other dtypes and scenarios of two presets that differ in gate, biases and strides,
            and edge cases.
        family: key of [`~modeling_moe.dispatch.backends.triton.tiles.CONFIGS`].
    """
    one, two = ["qwen3_30b_a3b"], ["qwen3_30b_a3b", "gpt_oss_20b"]
    if part == "small":
        calls = [*preset_calls(family, one, ["bfloat16"], ["train", "lora"], [32768])]
        return [*calls, *preset_calls(family, one, ["bfloat16"], ["decode"], [1])]
    calls = [*preset_calls(family, GPU_PRESETS, ["bfloat16"], ["train", "infer", "decode", "routing"])]
    calls += preset_calls(family, two, ["bfloat16"], ["lora"])
    if part == "all":
        calls += preset_calls(family, two, ["bfloat16"], SCENARIOS)
        calls += preset_calls(family, two, ["float32", "tf32"], ["train", "infer", "lora", "decode"])
        calls += preset_calls(family, one, ["float16"], ["train", "decode"])
        calls += edge_calls()
    return [*dict.fromkeys(calls)]
