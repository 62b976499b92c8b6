# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module records the launches of a call of the Triton back end on meta tensors, without memory, GPU or
computation.

# T tokens, K experts per token, E experts, H hidden, I expert width, C = I or 2I columns, R rank
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from modeling_moe.dispatch.backends.triton import backend as triton_backend
from modeling_moe.dispatch.backends.triton import launching, tiles
from modeling_moe.dispatch.backends.triton.launching import Launch
from modeling_moe.dispatch.gates import GATES
from modeling_moe.dispatch.low_rank import LowRank, LowRankPair
from modeling_moe.dispatch.token_order import Slots

from .calls import KINDS, SCENARIOS, Call, Scenario


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _low_rank(call: Call, scenario: Scenario, dtype: torch.dtype, columns: int) -> LowRankPair | None:
    """Returns updates with PEFT's memory layout: the experts are the innermost dimension of b."""
    if not scenario.rank:
        return None
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
    return LowRankPair(up, update("down", experts.width, experts.hidden, call.tokens * experts.per_token))


def _run(call: Call, config: tiles.Config | None) -> None:
    """Runs the back end on the meta tensors of a call."""
    experts, scenario = call.experts, SCENARIOS[call.scenario]
    dtype = torch.float32 if call.dtype == "tf32" else getattr(torch, call.dtype)
    matrix_dtype = torch.float32 if scenario.mixed else dtype
    columns, slots = GATES[experts.gate].columns * experts.width, call.tokens * experts.per_token
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
    rest = (up, down, up_bias, down_bias, experts.gate, constants)
    if call.scenario == "routing":
        triton_backend.group_slots(index, experts.number)
    elif call.scenario == "decode":
        triton_backend.decode(x, index, weight, *rest)
    grouped = Slots(_meta(slots, dtype=torch.int32), _meta(experts.number + 1, dtype=torch.int32))
    low_rank = _low_rank(call, scenario, dtype, columns)
    if scenario.keep is not None:
        triton_backend.forward(x, grouped, weight, *rest, scenario.keep, low_rank, config=config)
    if scenario.stored is not None:
        h = _meta(slots if scenario.stored else 0, columns, dtype=dtype)
        trained = not scenario.frozen
        needs = [True, True, trained, trained, trained and experts.bias, trained and experts.bias]
        for name in ("up", "down") if low_rank is not None else ():
            needs += [name in scenario.updated] * 2
        triton_backend.backward(x, x, h, grouped, weight, *rest, needs, low_rank, config=config)


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
