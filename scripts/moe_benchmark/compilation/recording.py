# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module records the launches of a call of the Triton back end on meta tensors, without memory, GPU or
computation.

# T tokens, K experts per token, E experts, H hidden, I expert width, C = I or 2I columns, R rank
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from modeling_moe.dispatch.activations import ACTIVATIONS
from modeling_moe.dispatch.backends.triton import launching, tiles
from modeling_moe.dispatch.backends.triton.backend import TritonBackend
from modeling_moe.dispatch.backends.triton.launching import Launch
from modeling_moe.dispatch.expert_order import ExpertOrder
from modeling_moe.dispatch.low_rank import LowRank
from modeling_moe.dispatch.problem import ExpertsProblem, Needs

from .calls import KINDS, SCENARIOS, Call, Scenario


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _updates(
    call: Call, scenario: Scenario, dtype: torch.dtype, columns: int
) -> tuple[LowRank | None, LowRank | None]:
    """Returns the updates of the first and the second matrices as PEFT holds them: the experts are innermost in b."""
    if not scenario.rank:
        return None, None
    experts, rank = call.experts, scenario.rank
    dtype = dtype if scenario.dropout else torch.float32

    def update(name: str, inputs: int, outputs: int, rows: int) -> LowRank | None:
        if name not in scenario.updated:
            return None
        a = _meta(experts.number, rank, inputs, dtype=dtype)
        b = _meta(outputs, rank, experts.number, dtype=dtype).permute(2, 0, 1)
        kept = _meta(rows, inputs, dtype=torch.bool) if scenario.dropout else None
        return LowRank(a, b, 2.0, 0.1 if scenario.dropout else 0.0, kept)

    up = update("up", experts.hidden, columns, call.tokens)
    return up, update("down", experts.width, experts.hidden, call.tokens * experts.per_token)


def _run(call: Call, config: tiles.Config | None) -> None:
    """Passes meta tensors of a call through the back end."""
    experts, scenario, backend = call.experts, SCENARIOS[call.scenario], TritonBackend()
    dtype = torch.float32 if call.dtype == "tf32" else getattr(torch, call.dtype)
    matrix_dtype = torch.float32 if scenario.mixed else dtype
    columns, assignments = ACTIVATIONS[experts.gate].columns * experts.width, call.tokens * experts.per_token
    index = _meta(call.tokens, experts.per_token, dtype=torch.int64)

    def matrices(rows: int, columns: int) -> torch.Tensor:
        if experts.transposed:
            return _meta(experts.number, columns, rows, dtype=matrix_dtype).transpose(1, 2)
        return _meta(experts.number, rows, columns, dtype=matrix_dtype)

    x, weight = _meta(call.tokens, experts.hidden, dtype=dtype), _meta(*index.shape, dtype=torch.float32)
    up, down = matrices(columns, experts.hidden), matrices(experts.hidden, experts.width)
    up_bias = _meta(experts.number, columns, dtype=matrix_dtype) if experts.bias else None
    down_bias = _meta(experts.number, experts.hidden, dtype=matrix_dtype) if experts.bias else None
    constants = [1.702, 7.0] if experts.gate.startswith("clamped") else []
    updates = _updates(call, scenario, dtype, columns)
    problem = ExpertsProblem(x, weight, up, down, up_bias, down_bias, experts.gate, constants, *updates)
    if call.scenario == "routing":
        backend.order_by_expert(index, experts.number)
    elif call.scenario == "decode":
        backend.decode(problem, index)
    order = ExpertOrder(_meta(assignments, dtype=torch.int32), _meta(experts.number + 1, dtype=torch.int32))
    if scenario.keep is not None:
        backend.forward(problem, order, scenario.keep, config)
    if scenario.stored is not None:
        h = _meta(assignments if scenario.stored else 0, columns, dtype=dtype)
        trained = not scenario.frozen
        biased = trained and experts.bias
        up_trained, down_trained = (update is not None for update in updates)
        factors = (up_trained, up_trained, down_trained, down_trained)
        needs = Needs(True, True, trained, trained, biased, biased, *factors)
        backend.backward(problem, order, x, h, needs, config)


@contextmanager
def _precision(dtype: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def record(call: Call, family: str, config: tiles.Config | None = None) -> list[Launch]:
    """Returns the launches of a call, with the tiles of a family, or with `config` instead of them.

    The tensors among the arguments are on the meta device, so that any size is possible. No GPU is used.
    """
    launches: list[Launch] = []
    with tiles.assumed(family), _precision(call.dtype), launching.intercepted(launches.append):
        _run(call, config)
    return launches


def changed(call: Call, family: str, changes: dict[str, Any]) -> tiles.Config | None:
    """Returns the configuration of a call with `changes` to its fields; None if there are no changes."""
    if not changes:
        return None
    rows = call.tokens * call.experts.per_token / call.experts.number
    table = tiles.CONFIGS[family][KINDS[call.dtype]]
    return next(config for most, config in table if rows <= most)._replace(**changes)
