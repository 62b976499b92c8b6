# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs passes of the Triton back end at a preset's shape, with random weights, inputs and low-rank
factors.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden, I expert width, C columns of the first
matrix
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from modeling_moe.dispatch.backends.triton import backend as triton_backend
from modeling_moe.dispatch.backends.triton.tiles import Config, Decoding
from modeling_moe.dispatch.low_rank import LowRank, LowRankPair

from ..presets import PRESETS
from ..routing import route
from .sizes import Shape


RANK = 16


class Problem(NamedTuple):
    """Holds the tensors of one [`Shape`].

    Attributes:
        shape: the shape.
        x: input (T, H).
        index: expert ids (T, K) int64.
        weight: routing weights (T, K) float32.
        matrices: up (E, C, H), down (E, H, I), their biases (E, C) and (E, H) or None, the gate and its constants.
        low_rank: the updates of scenario `"lora"`, of rank 16; else None.
    """

    shape: Shape
    x: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    matrices: Any
    low_rank: LowRankPair | None

    @property
    def slots(self) -> int:
        """Number of assignments A."""
        return self.index.numel()


def torch_dtype(name: str) -> torch.dtype:
    """Returns the dtype of a [`Shape`]'s tensors."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Allows products in float32 to be rounded to TF32 if `name` is `"tf32"`, and forbids it otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make(shape: Shape, device: str = "cuda") -> Problem:
    """Draws the tensors of a shape; on `"meta"` they have only sizes, which suffice to record launches."""
    preset, dtype = PRESETS[shape.preset], torch_dtype(shape.dtype)
    hidden, width, experts = preset.hidden, preset.intermediate, preset.experts
    torch.manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(std=sizes[-1] ** -0.5)

    if preset.family == "gpt_oss":
        up, down = draw(experts, hidden, 2 * width).transpose(1, 2), draw(experts, width, hidden).transpose(1, 2)
        biases, gate = (draw(experts, 2 * width), draw(experts, hidden)), ("clamped_swiglu_pairs", [1.702, 7.0])
    else:
        up, down = draw(experts, 2 * width, hidden), draw(experts, hidden, width)
        biases, gate = (None, None), ("silu_gated", [])
    index, weight = (tensor.to(device) for tensor in route("balanced", shape.tokens, preset))
    x = torch.empty(shape.tokens, hidden, dtype=dtype, device=device).normal_()
    low_rank = None
    if shape.scenario == "lora":
        low_rank = LowRankPair(_update(experts, hidden, 2 * width, device), _update(experts, width, hidden, device))
    return Problem(shape, x, index, weight, (up, down, *biases, *gate), low_rank)


def _update(experts: int, columns: int, rows: int, device: str) -> LowRank:
    """Returns low-rank factors with PEFT's memory layout: float32, with the experts innermost in B."""
    a = torch.empty(experts, RANK, columns, device=device).normal_(std=columns**-0.5)
    b = torch.empty(rows, RANK, experts, device=device).normal_(std=0.02).permute(2, 0, 1)
    return LowRank(a, b, 2.0)


def run(problem: Problem, config: Config | Decoding | None = None) -> Any:
    """Runs the scenario of a problem once, with the blocks of `config`, or those of the table without it."""
    shape, x, index, weight, matrices, low_rank = problem
    backend: Any = triton_backend
    with precision(shape.dtype):
        if shape.scenario == "decode":
            return backend.decode(x, index, weight, *matrices, decoding_blocks=config)
        slots = backend.group_slots(index, len(matrices[0]))
        if shape.scenario == "infer":
            return backend.forward(x, slots, weight, *matrices, False, config=config)
        output, h = backend.forward(x, slots, weight, *matrices, True, low_rank, config=config)
        needs = [True] * 4 + [matrices[2] is not None] * 2
        if low_rank is not None:
            needs = [True, True] + [False] * 4 + [True] * 4
        return output, backend.backward(x, x, h, slots, weight, *matrices, needs, low_rank, config=config)
