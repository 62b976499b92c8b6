# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Back end `triton` computes the experts on a GPU, in float32, float16 and bfloat16.

Importing this module raises ImportError where Triton is not installed. Nothing waits for the device and nothing is
added atomically, so the same input gives the same bits.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
# C columns of the first projection
"""

import functools
import warnings
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes

from ... import expert_order
from ...backend import Backend
from ...expert_order import ExpertOrder
from ...low_rank import FactorGradients, LowRank
from ...problem import Combined, ExpertsProblem, Gradients, Needs
from .casting import cast
from .kernels import decoding, products, sorting
from .launching import launch, strides_of, uninterrupted
from .low_rank import TritonUpdate
from .row_tiles import RowGradients, RowTiles, activation_constants, activation_options, contiguous
from .tiles import DECODING, Config, Decoding, family_of, serves


INTERPRETED = not isinstance(products.combine, triton.JITFunction)
# assignments that one program of the sort counts: more of them from LARGE_SORT assignments on, because each program
# reads the counts of all; and assignments that a program places at a time
SORT_BLOCK, LARGE_SORT_BLOCK, LARGE_SORT, SORT_STEP = 1024, 4096, 1 << 18, 128
# experts of a token whose second matrices decoding reads without a loop
DECODE_UNROLL = 8


class TritonBackend(Backend):
    """TritonBackend computes the experts by Triton kernels."""

    name = "triton"
    default_devices = ("cuda",)
    casts_matrices = True

    @torch.compiler.assume_constant_result
    def reason_unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why the kernels do not run on a device, or None if they do.

        They run on a GPU that multiplies bfloat16, and on any device if Triton is interpreted.
        """
        if dtype == torch.float64:
            return "it does not multiply float64"
        if INTERPRETED:
            return None
        if device.type != "cuda" or not torch.cuda.is_available():
            return "it runs on GPUs, or with TRITON_INTERPRET=1"
        if not serves(device):
            return "it serves NVIDIA GPUs from compute capability 8.0 on, and AMD's gfx942 and gfx950"
        # nothing may be read back while a CUDA graph is captured; the warm-up pass before has asked
        if torch.cuda.is_current_stream_capturing() or launches_on(device):
            return None
        return "a kernel does not launch there: see the warning"

    def decodes(self, problem: ExpertsProblem) -> bool:
        """Returns True without updates."""
        return not problem.updated

    def order_by_expert(self, index: torch.Tensor, num_experts: int) -> ExpertOrder:
        """Sorts the assignments of `index` (T, K) by expert in two launches."""
        return sort(index, num_experts)

    def forward(
        self, problem: ExpertsProblem, order: ExpertOrder, keep_h: bool, config: Config | None = None
    ) -> Combined:
        """Computes the experts as described at [`~modeling_moe.dispatch.backend.Backend.forward`]."""
        with torch.cuda.device_of(problem.x):
            work = _Work.of(problem, order, Needs(), config)
            problem, rows = work.problem, work.rows
            addition = None if work.up_update is None else work.up_update.forward(problem.x)
            up = cast(problem.up, problem.x.dtype)
            h, acted = rows.project_up(problem, up, kept=keep_h, acted=True, addition=addition)
            del up
            assert acted is not None  # it was asked for
            addition = None if work.down_update is None else work.down_update.forward(acted)
            y = rows.multiply(acted, cast(problem.down, problem.x.dtype), problem.down_bias, addition)
            output = rows.combine(y, problem.weight)
        return Combined(output, problem.x.new_empty(0, problem.up.shape[1]) if h is None else h)

    def backward(
        self,
        problem: ExpertsProblem,
        order: ExpertOrder,
        grad: torch.Tensor,
        h: torch.Tensor,
        needs: Needs,
        config: Config | None = None,
    ) -> Gradients:
        """Computes gradients as described at [`~modeling_moe.dispatch.backend.Backend.backward`]."""
        with torch.cuda.device_of(problem.x):
            return _backward(_Work.of(problem, order, needs, config), grad.contiguous(), h, needs)

    def decode(
        self, problem: ExpertsProblem, index: torch.Tensor, decoding_blocks: Decoding | None = None
    ) -> torch.Tensor:
        """Computes the output as described at [`~modeling_moe.dispatch.backend.Backend.decode`].

        Each assignment is one matrix-vector product for each matrix; the activations (A, I) are float32.
        """
        return _decode(problem, index, decoding_blocks or DECODING[family_of(problem.x.device)])


@functools.cache
def launches_on(device: torch.device) -> bool:
    """Returns True if a kernel of the smallest kind runs on a device, and warns once with the reason if not."""
    try:
        with _disable_current_modes(), uninterrupted():
            result: object = sort(torch.tensor([1, 0, 1], device=device), 2).offsets.tolist()
    except Exception as error:  # compilers, drivers and launchers fail in many ways
        result = f"{type(error).__name__}: {error}"
    if result == [0, 1, 3]:
        return True
    warnings.warn(
        f"Triton does not work on {device} ({result}), so torch's grouped_mm computes the experts, slower and with "
        "more memory. Triton needs a C compiler and a driver that its ptxas is not newer than.",
        stacklevel=2,
    )
    return False


def sort(index: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sorts assignments as [`~modeling_moe.dispatch.expert_order.order_by_expert`] does, in two launches."""
    index, number = index.contiguous(), index.numel()
    if not number:
        return expert_order.order_by_expert(index, num_experts)
    block = SORT_BLOCK if number <= LARGE_SORT else LARGE_SORT_BLOCK
    blocks, bins = triton.cdiv(number, block), triton.next_power_of_2(num_experts + 1)
    assignment, offsets, counts = (
        torch.empty(size, dtype=torch.int32, device=index.device)
        for size in ((number,), (num_experts + 1,), (blocks, bins))
    )
    sizes = {"BLOCK": block, "BINS": bins}
    shared = {"index": index, "counts": counts, "num_assignments": number, "num_experts": num_experts}
    with torch.cuda.device_of(index):
        launch(sorting.count_slots, (blocks,), sizes, **shared)
        launch(
            sorting.place_slots,
            (blocks,),
            {"STEP": SORT_STEP, "ROWS": max(1, 8192 // bins), **sizes},
            **shared,
            order=assignment,
            offsets=offsets,
            num_blocks=blocks,
        )
    return ExpertOrder(assignment, offsets)


class _Work(NamedTuple):
    """_Work holds what both passes work with.

    Attributes:
        problem: with contiguous tokens and combine weights.
        rows: the tiles of rows.
        up_update: the low-rank update of the first matrices, or None.
        down_update: the low-rank update of the second matrices, or None.
    """

    problem: ExpertsProblem
    rows: RowTiles
    up_update: TritonUpdate | None
    down_update: TritonUpdate | None

    @classmethod
    def of(cls, problem: ExpertsProblem, order: ExpertOrder, needs: Needs, config: Config | None) -> "_Work":
        """Makes tensors contiguous and cuts the rows into tiles."""
        problem = problem._replace(x=problem.x.contiguous(), weight=problem.weight.contiguous())
        rows = RowTiles(problem, order, config)

        def update(low_rank: LowRank | None, gathered: bool, needs: tuple[bool, bool]) -> TritonUpdate | None:
            return None if low_rank is None else TritonUpdate(low_rank, rows, problem.x.dtype, gathered, needs)

        up, down = (
            update(problem.up_update, True, needs.up_factors),
            update(problem.down_update, False, needs.down_factors),
        )
        return cls(problem, rows, up, down)


def _backward(work: _Work, grad: torch.Tensor, h: torch.Tensor, needs: Needs) -> Gradients:
    """Computes the gradients that are needed, and h again if it is empty."""
    problem, rows, up_update, down_update = work
    up, down = cast(problem.up, problem.x.dtype), cast(problem.down, problem.x.dtype)
    if not len(h):
        addition = None if up_update is None else up_update.forward(problem.x)
        projected = rows.project_up(problem, up, kept=True, acted=False, addition=addition).h
        assert projected is not None  # it was asked for
        h = projected
    wanted = (
        needs.x or needs.up or needs.up_bias or any(needs.up_factors),
        needs.down or any(needs.down_factors),
        needs.weight,
    )
    addition = None if down_update is None else down_update.backward(grad)
    by_row = rows.activation_backward(problem, grad, h, down, wanted, addition)
    del down
    behind = _gradients_behind_activation(work, grad, by_row, needs)
    grad_h = by_row.h
    del by_row
    return _gradients_before_activation(work, up, grad_h, needs, behind)


def _gradients_behind_activation(work: _Work, grad: torch.Tensor, by_row: RowGradients, needs: Needs) -> Gradients:
    """Computes the gradients of the combine weights, the second matrices, their biases and their updates."""
    problem, rows, _, down_update = work
    grad_weight = grad_down = grad_down_bias = None
    factors = FactorGradients()
    if by_row.weight is not None:
        served = rows.inverse < rows.order.offsets[-1]
        chosen = by_row.weight.index_select(0, rows.inverse)
        grad_weight = torch.where(served, chosen, 0.0).view_as(problem.weight)
    if by_row.scaled is not None:
        if needs.down:
            grad_down = rows.weight_gradient(grad, by_row.scaled, problem.down, "left")
        if down_update is not None:
            down_update.accumulate(grad, by_row.scaled)
            factors = down_update.gradients()
    if needs.down_bias and problem.down_bias is not None:
        grad_down_bias = rows.bias_gradient(grad, problem.weight, problem.down_bias)
    return Gradients(weight=grad_weight, down=grad_down, down_bias=grad_down_bias, down_a=factors.a, down_b=factors.b)


def _gradients_before_activation(
    work: _Work, up: torch.Tensor, grad_h: torch.Tensor | None, needs: Needs, others: Gradients
) -> Gradients:
    """Adds the gradients of the tokens, the first matrices, their biases and their updates to the others."""
    if grad_h is None:
        return others
    problem, rows, up_update, _ = work
    grad_x = grad_up = grad_up_bias = addition = None
    factors = FactorGradients()
    if needs.up:
        grad_up = rows.weight_gradient(grad_h, problem.x, problem.up, "right")
    if needs.up_bias and problem.up_bias is not None:
        grad_up_bias = rows.bias_gradient(grad_h, None, problem.up_bias)
    if up_update is not None and (needs.x or any(needs.up_factors)):
        addition = up_update.backward(grad_h)
        up_update.accumulate(grad_h, problem.x)
        factors = up_update.gradients()
    if needs.x:
        grad_x = rows.combine(rows.multiply(grad_h, up.transpose(1, 2), None, addition), None)
    return others._replace(x=grad_x, up=grad_up, up_bias=grad_up_bias, up_a=factors.a, up_b=factors.b)


def _decode_blocks(contiguous: bool, rows: int, depth: int, per_block: int, num_warps: int) -> dict[str, int]:
    """Returns blocks of 8192 numbers along the matrix's contiguous dimension, or of half as many across it."""
    block_n, numbers = (rows, 8192) if contiguous else (32, 4096)
    block_k = min(numbers // (block_n * per_block), triton.next_power_of_2(depth))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps}


def _decode(problem: ExpertsProblem, index: torch.Tensor, chosen: Decoding) -> torch.Tensor:
    """Computes the output (T, H) of a few tokens by matrix-vector products of two launches."""
    x, up, down = problem.x, problem.up, problem.down
    (num_tokens, top_k), (num_experts, hidden, inner), out = index.shape, down.shape, x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        index = index.contiguous()
        a = torch.empty(num_tokens * top_k, inner, dtype=torch.float32, device=x.device)
        shared = {"index": index, "num_experts": num_experts, "hidden": hidden, "inner": inner, "a": a}
        blocks = _decode_blocks(up.stride(2) == 1, chosen.up, hidden, up.shape[1] // inner, chosen.num_warps)
        even = hidden % blocks["BLOCK_K"] == 0 and inner % blocks["BLOCK_N"] == 0
        launch(
            decoding.decode_up,
            (len(a), triton.cdiv(inner, blocks["BLOCK_N"])),
            {"TOP_K": top_k, "EVEN": even, **activation_options(problem.activation), **blocks},
            x=x.contiguous(),
            up=up,
            **strides_of("stride", "ech", up),
            bias=contiguous(problem.up_bias),
            **shared,
            **activation_constants(problem.constants),
        )
        rows = chosen.down if num_tokens <= chosen.few else chosen.down_many
        blocks = _decode_blocks(down.stride(2) == 1, rows, inner, 1, chosen.num_warps)
        launch(
            decoding.decode_down,
            (num_tokens, triton.cdiv(hidden, blocks["BLOCK_N"])),
            {"TOP_K": top_k, "UNROLL": min(top_k, DECODE_UNROLL), **blocks},
            weight=problem.weight.contiguous(),
            down=down,
            **strides_of("stride", "ehi", down),
            bias=contiguous(problem.down_bias),
            out=out,
            **shared,
        )
    return out
