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

from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.dispatch.backends.triton.backend import TritonBackend
from modeling_moe.dispatch.backends.triton.tiles import Config, Decoding
from modeling_moe.dispatch.low_rank import LowRank
from modeling_moe.dispatch.problem import ExpertsProblem, Needs

from ..presets import PRESETS
from ..routing import route
from .sizes import Shape


RANK = 16


class Problem(NamedTuple):
    """Problem holds the tensors of one [`Shape`].

    Attributes:
        shape: the shape that they are made for.
        experts: the problem that the back end is given, with updates of rank 16 in scenario `"lora"`.
        index: (T, K) int64.
    """

    shape: Shape
    experts: ExpertsProblem
    index: torch.Tensor

    @property
    def slots(self) -> int:
        """The number of assignments."""
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
    problem = ExpertsProblem(x, weight, up, down, *biases, *gate)
    if shape.scenario == "lora":
        problem = problem._replace(
            up_update=_update(experts, hidden, 2 * width, device),
            down_update=_update(experts, width, hidden, device),
        )
    return Problem(shape, problem, index)


def _update(experts: int, columns: int, rows: int, device: str) -> LowRank:
    """Returns low-rank factors with PEFT's memory layout: float32, with the experts innermost in B."""
    a = torch.empty(experts, RANK, columns, device=device).normal_(std=columns**-0.5)
    b = torch.empty(rows, RANK, experts, device=device).normal_(std=0.02).permute(2, 0, 1)
    return LowRank(a, b, 2.0)


def run(problem: Problem, config: Config | Decoding | None = None) -> Any:
    """Runs the scenario of a problem once, with the blocks of `config` in place of the table's if it is given."""
    shape, experts, index = problem
    backend = BACKENDS["triton"]
    assert isinstance(backend, TritonBackend)
    with precision(shape.dtype):
        if shape.scenario == "decode":
            assert not isinstance(config, Config)
            return backend.decode(experts, index, config)
        assert not isinstance(config, Decoding)
        order = backend.order_by_expert(index, len(experts.up))
        if shape.scenario == "infer":
            return backend.forward(experts, order, False, config)
        output, h = backend.forward(experts, order, True, config)
        biased = experts.up_bias is not None
        needs = Needs(True, True, True, True, biased, biased)
        if experts.updated:
            needs = Needs(x=True, weight=True, up_a=True, up_b=True, down_a=True, down_b=True)
        return output, backend.backward(experts, order, experts.x, h, needs, config)
