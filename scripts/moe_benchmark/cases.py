# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the measurements of a run, the most important first."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .presets import EXPERT_SWEEP, GPU_PRESETS, PRESETS


LEVELS = ("experts", "block", "model")
MODES = ("forward", "forward_backward", "decode")
DECODE_TOKENS = (1, 16)


@dataclass(frozen=True)
class Case:
    """Describes one measurement.

    Attributes:
        level: `"experts"` alone, the sparse `"block"` with its router, a `"model"` of two layers, `"lora"`, a model of
            two layers with LoRA, or `"watching"`, a model of two layers whose routing is logged, or
            `"offload"`, a model of four layers whose experts are on disk.
        preset: key of `PRESETS`.
        dtype: name of the torch dtype of weights and tokens.
        tokens: number of tokens T; in decoding at the level `"model"` the number of sequences, each with one new
            token.
        routing: key of `ROUTINGS`; `"router"` at levels with a router.
        mode: `"forward"` without gradients, `"forward_backward"` with all gradients, or `"decode"`: without gradients
            and with cold caches.
    """

    level: str
    preset: str
    dtype: str
    tokens: int
    routing: str
    mode: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype named by `dtype`."""
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.level} {self.preset} {self.dtype} T={self.tokens} {self.routing} {self.mode}"


def _cpu_experts() -> list[Case]:
    def case(preset: str, dtype: str, mode: str, tokens: int = 2048, routing: str = "balanced") -> Case:
        return Case("experts", preset, dtype, tokens, routing, mode)

    shapes = [(preset, dtype) for dtype in ("float32", "bfloat16") for preset in ("cpu_fine", "cpu_coarse")]
    return [
        *(case(preset, "float32", "forward_backward") for preset in ("cpu_fine", "cpu_coarse")),
        case("cpu_fine", "float32", "forward_backward", routing="all_to_one"),
        *(case(*shape, "decode", tokens) for shape in shapes for tokens in DECODE_TOKENS),
        *(case(preset, "float32", "forward_backward") for preset in EXPERT_SWEEP),
        *(case(preset, "float32", "forward") for preset in ("cpu_fine", "cpu_coarse")),
        # these are last, because they take minutes without AVX-512
        *(case(preset, "bfloat16", mode) for mode in MODES[1::-1] for preset in ("cpu_fine", "cpu_coarse")),
    ]


def _cuda_experts() -> list[Case]:
    """Returns the cases of all GPU presets: the most important sizes first, those that a short run omits last."""

    def cases(preset: str, tokens: Sequence[int], routing: str = "balanced") -> list[Case]:
        passes = [(count, mode) for count in tokens for mode in ("forward_backward", "forward")]
        return [Case("experts", preset, "bfloat16", count, routing, mode) for count, mode in passes]

    chosen = []
    for preset in GPU_PRESETS:
        chosen += cases(preset, (32768, 4096))
        chosen += [Case("experts", preset, "bfloat16", count, "balanced", "decode") for count in DECODE_TOKENS]
    first = next(iter(GPU_PRESETS))
    for routing in ("zipf", "all_to_one"):
        chosen += cases(first, (32768, 4096), routing)
    for preset in GPU_PRESETS:
        chosen += cases(preset, (1024, 128))
    return chosen


def default_cases(device: str, level: str) -> list[Case]:
    """Returns the default cases: on the CPU those that the documentation reports, on a GPU all large presets."""
    if level == "experts":
        return _cuda_experts() if device == "cuda" else _cpu_experts()
    preset = "qwen3_30b_a3b" if device == "cuda" else "cpu_fine"
    dtypes = ["bfloat16"] if device == "cuda" else ["float32"]
    return make_cases(device, level, [preset], dtypes, [], [], [])


def make_cases(
    device: str,
    level: str,
    presets: Sequence[str],
    dtypes: Sequence[str],
    tokens: Sequence[int],
    routings: Sequence[str],
    modes: Sequence[str],
) -> list[Case]:
    """Returns all combinations of the given values; an empty list stands for the device's defaults.

    Tokens and modes depend on each other: without `modes` small numbers of tokens decode and large ones train;
    without `tokens` decoding has small numbers and training large ones.
    """
    many = (32768, 4096) if device == "cuda" else (2048,)
    presets = presets or (list(GPU_PRESETS) if device == "cuda" else ["cpu_fine", "cpu_coarse"])
    presets = [preset for preset in presets if level == "experts" or PRESETS[preset].family == "gated"]
    dtypes = dtypes or (["bfloat16"] if device == "cuda" else ["float32", "bfloat16"])
    routings = ["router"] if level != "experts" else routings or ["balanced"]
    pairs = [
        (count, mode)
        for mode in modes or MODES
        for count in tokens or (DECODE_TOKENS if mode == "decode" else many)
        if modes or (mode == "decode") == (count <= max(DECODE_TOKENS))
    ]
    return [
        Case(level, preset, dtype, count, routing, mode)
        for preset in presets
        for dtype in dtypes
        for routing in routings
        for count, mode in pairs
    ]


def lora_cases(device: str, presets: Sequence[str], dtypes: Sequence[str], tokens: Sequence[int]) -> list[Case]:
    """Returns all combinations with LoRA on experts; an empty list stands for the device's defaults."""
    cuda = device == "cuda"
    presets = presets or ["qwen3_30b_a3b" if cuda else "cpu_lora"]
    dtypes = dtypes or ["bfloat16" if cuda else "float32"]
    tokens = tokens or ((32768, 4096) if cuda else (1, 64, 512))
    return [
        Case("lora", preset, dtype, count, "router", mode)
        for preset in presets
        for dtype in dtypes
        for count in tokens
        for mode in MODES[:2]
    ]


def watching_cases(device: str, presets: Sequence[str], dtypes: Sequence[str], tokens: Sequence[int]) -> list[Case]:
    """Returns all combinations with the routing logged; an empty list stands for the device's defaults."""
    cuda = device == "cuda"
    presets = presets or (["olmoe"] if cuda else ["cpu_demo", "cpu_fine"])
    dtypes = dtypes or ["bfloat16" if cuda else "float32"]
    tokens = tokens or ((32768,) if cuda else (512, 2048))
    return [
        Case("watching", preset, dtype, count, "router", MODES[1])
        for preset in presets
        for dtype in dtypes
        for count in tokens
    ]


def offload_cases(presets: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """Returns all combinations with the experts on disk, decoding one text; an empty list stands for the defaults."""
    return [
        Case("offload", preset, dtype, 1, "router", MODES[2])
        for preset in presets or ("cpu_fine", "cpu_demo")
        for dtype in dtypes or ("float32", "bfloat16")
    ]


def shape_of(case: Case) -> tuple[int, int, int]:
    """Returns H, I and K, which with E determine the work of a case."""
    preset = PRESETS[case.preset]
    return preset.hidden, preset.intermediate, preset.per_token
