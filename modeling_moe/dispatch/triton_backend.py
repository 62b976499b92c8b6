# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The dispatch on a GPU, in Triton: float32, float16 and bfloat16. Without Triton its import is an ImportError.

# T tokens, K experts per token, S = T*K slots; E experts; H hidden, I expert width, C = I or 2I columns of h
# x, grad (T, H); h (S, C), in the order of slots.order, where rows of empty slots are neither written nor read
# weight (T, K) float32; up (E, C, H), down (E, H, I) of any strides; up_bias (E, C), down_bias (E, H) or None
# gate: a key of gates.GATES; constants: what it takes, [alpha, limit] for the clamped ones, else []

Nothing waits for the device and nothing is added atomically: the same input gives the same bits.
"""

import math
from typing import NamedTuple

import torch
import triton

from . import composed, kernels
from .slots import Slots, invert


class Tile(NamedTuple):
    """A block of a kernel's output, the step of its inner loop, and how it is scheduled."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """The tiles of the matrix products. All but `gradient` run over the same blocks of rows: one BLOCK_M.

    Attributes:
        up: of a, and the same columns of h.
        down: of y, and in backward of the gradient of x.
        gate: of a's gradient.
        gradient: of the gradients of the matrices.
    """

    up: Tile
    down: Tile
    gate: Tile
    gradient: Tile


# bytes per element -> (the most rows an expert has on average, the tiles)
# a stage is a buffer, save that `gradient`, which fetches its rows' numbers ahead, has two fewer; without wgmma all have
# one fewer, so that the largest, 147 KiB on an H100, fit into the 99 KiB of an Ada or RTX Blackwell GPU
CONFIGS: dict[int, list[tuple[float, Config]]] = {
    2: [
        (
            16,
            Config(
                up=Tile(16, 64, 128, 4, 3),
                down=Tile(16, 64, 128, 4, 4),
                gate=Tile(16, 64, 128, 4, 3),
                gradient=Tile(128, 128, 16, 8, 5),
            ),
        ),
        (
            32,
            Config(
                up=Tile(32, 64, 128, 4, 3),
                down=Tile(32, 64, 128, 4, 4),
                gate=Tile(32, 64, 128, 4, 3),
                gradient=Tile(128, 128, 32, 8, 5),
            ),
        ),
        (
            256,
            Config(
                up=Tile(64, 64, 64, 4, 4),
                down=Tile(64, 128, 64, 4, 4),
                gate=Tile(64, 64, 64, 4, 4),
                gradient=Tile(128, 128, 64, 8, 5),
            ),
        ),
        (
            math.inf,
            Config(
                up=Tile(128, 128, 64, 8, 3),
                down=Tile(128, 256, 64, 8, 3),
                gate=Tile(128, 128, 64, 8, 3),
                gradient=Tile(128, 128, 64, 8, 5),
            ),
        ),
    ],
    4: [
        (
            16,
            Config(
                up=Tile(16, 32, 32, 4, 2),
                down=Tile(16, 32, 32, 4, 2),
                gate=Tile(16, 32, 32, 4, 2),
                gradient=Tile(64, 64, 16, 4, 3),
            ),
        ),
        (
            math.inf,
            Config(
                up=Tile(64, 32, 32, 4, 2),
                down=Tile(64, 64, 32, 4, 2),
                gate=Tile(64, 64, 32, 4, 2),
                gradient=Tile(64, 64, 32, 4, 3),
            ),
        ),
    ],
}
INTERPRETED = not isinstance(kernels.combine, triton.JITFunction)


@torch.compiler.assume_constant_result
def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: a GPU that multiplies bfloat16, or anything if Triton is interpreted."""
    if INTERPRETED or device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETED
    return torch.cuda.get_device_capability(device) >= (8, 0)


def choose_config(num_slots: int, num_experts: int, element_size: int) -> Config:
    """The tiles for an average expert's rows, whatever the router's balance: the host does not know it."""
    return next(config for rows, config in CONFIGS[element_size] if num_slots <= rows * num_experts)


def _gate_options(gate: str, constants: list[float]) -> dict:
    alpha, limit = (float(constant) for constant in constants or (0, 0))
    layout = "pairs" if gate.endswith("_pairs") else "halves" if gate.endswith("_gated") else "plain"
    activation = gate.removesuffix("_gated").removesuffix("_pairs")
    return {"alpha": alpha, "limit": limit, "ACTIVATION": activation, "LAYOUT": layout}


def _launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Nothing, where there is nothing to do."""
    if 0 not in grid:
        kernel[grid](*arguments, **options)


def _contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


class _Rows:
    """The rows in tiles, and the launches that run over them.

    Attributes:
        tiles: (2, number) int32, see kernels.py; the number is a bound the host knows, not the tiles in use.
    """

    def __init__(self, slots: Slots, top_k: int, element_size: int, config: Config | None):
        self.slots, self.top_k = slots, top_k
        self.num_slots, self.num_experts = len(slots.order), len(slots.offsets) - 1
        self.config = config or choose_config(self.num_slots, self.num_experts, element_size)
        block = self.config.up.BLOCK_M
        self.number = min(self.num_slots, triton.cdiv(self.num_slots, block) + self.num_experts)
        self.tiles = torch.empty(2, self.number, dtype=torch.int32, device=slots.order.device)
        experts = triton.next_power_of_2(self.num_experts)
        _launch(
            kernels.map_tiles, (self.num_experts + 1,),
            slots.offsets, self.tiles, self.num_experts, self.number, BLOCK_M=block, EXPERTS=experts,
        )  # fmt: skip

    def grid(self, columns: int, tile: Tile) -> tuple[int]:
        return (self.number * triton.cdiv(columns, tile.BLOCK_N),)

    def project_up(
        self, x, up, up_bias, gate, constants, kept: bool, acted: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """h (S, C) if `kept`, and a (S, I) if `acted`; else the gate, which decides what I is, should be a plain one."""
        options, tile = _gate_options(gate, constants), self.config.up if acted else self.config.down
        inner = up.shape[1] // (1 if options["LAYOUT"] == "plain" else 2)
        h = x.new_empty(self.num_slots, up.shape[1]) if kept else None
        a = x.new_empty(self.num_slots, inner) if acted else None
        _launch(
            kernels.project_up, self.grid(inner, tile),
            x, *self.slots, self.tiles, self.number, up, *up.stride(), _contiguous(up_bias), h, a,
            HIDDEN=x.shape[1], INNER=inner, TOP_K=self.top_k, **options, **tile._asdict(),
        )  # fmt: skip
        return h, a

    def multiply(self, left, weight, bias) -> torch.Tensor:
        """left (S, N) times each expert's weight (E, M, N), plus bias (E, M): (S, M)."""
        out = left.new_empty(self.num_slots, weight.shape[1])
        _launch(
            kernels.multiply, self.grid(weight.shape[1], self.config.down),
            left, self.slots.offsets, self.tiles, self.number, weight, *weight.stride(), _contiguous(bias), out,
            N=weight.shape[1], K=weight.shape[2], **self.config.down._asdict(),
        )  # fmt: skip
        return out

    def combine(self, y, weight, inverse) -> torch.Tensor:
        """y (S, H) -> (T, H), each token's rows times weight (T, K), or once if it is None, added up in float32."""
        out = y.new_empty(self.num_slots // self.top_k, y.shape[1])
        block = min(1024, triton.next_power_of_2(y.shape[1]))
        _launch(
            kernels.combine, (len(out), triton.cdiv(y.shape[1], block)),
            y, inverse, self.slots.offsets[-1:], weight, out, HIDDEN=y.shape[1], TOP_K=self.top_k, BLOCK_N=block,
        )  # fmt: skip
        return out

    def gate_backward(self, grad, h, weight, down, down_bias, gate, constants, wants) -> list:
        """What is wanted of: h's gradient (S, C), weight * a (S, I), and the gradient of each row's weight (S,)."""
        if not any(wants):
            return [None] * 3
        inner, tile = down.shape[2], self.config.gate
        partials = triton.cdiv(inner, tile.BLOCK_N)
        grad_h = torch.empty_like(h) if wants[0] else None
        scaled = h.new_empty(self.num_slots, inner) if wants[1] else None
        grad_weight = None
        if wants[2]:
            shape = (partials + (down_bias is not None), self.num_slots)
            grad_weight = torch.empty(shape, dtype=torch.float32, device=h.device)
        rows = (grad, *self.slots, self.tiles, self.number)
        _launch(
            kernels.gate_backward, self.grid(inner, tile),
            *rows, down, *down.stride(), h, weight, grad_h, scaled, grad_weight, self.num_slots,
            HIDDEN=grad.shape[1], INNER=inner, TOP_K=self.top_k, **_gate_options(gate, constants), **tile._asdict(),
        )  # fmt: skip
        if grad_weight is not None and down_bias is not None:
            _launch(
                kernels.dot_bias, (self.number,),
                *rows, _contiguous(down_bias), grad_weight[partials:],
                HIDDEN=grad.shape[1], TOP_K=self.top_k, BLOCK_M=tile.BLOCK_M, BLOCK_K=64,
            )  # fmt: skip
        return [grad_h, scaled, None if grad_weight is None else grad_weight.sum(0)]

    def weight_gradient(self, left, right, parameter, gather_left: bool, top_k: int | None = None) -> torch.Tensor:
        """Each expert's left^T right, like `parameter` (E, M, N); one of left and right is (T, .), the other (S, .).

        `top_k` says of how many slots the gathered one has a row, if not of K.
        """
        out, tile = torch.empty_like(parameter), self.config.gradient
        _, m, n = parameter.shape
        _launch(
            kernels.weight_gradient, (len(out) * triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N),),
            left, right, *self.slots, out, *out.stride(),
            M=m, N=n, TOP_K=top_k or self.top_k, GATHER_LEFT=gather_left, **tile._asdict(),
        )  # fmt: skip
        return out

    def bias_gradient(self, values, weight, parameter) -> torch.Tensor:
        """Each expert's sum of values (S, N), or of weight (T, K) times values (T, N), like `parameter` (E, N)."""
        out = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        _launch(
            kernels.bias_gradient, (len(out), triton.cdiv(out.shape[1], 64)),
            values, *self.slots, weight, out, N=out.shape[1], TOP_K=self.top_k, BLOCK_M=32, BLOCK_N=64,
        )  # fmt: skip
        return out


class _Products:
    """[`~modeling_moe.dispatch.composed.Products`] by the kernels, where an update stands between those that fuse."""

    def __init__(self, rows: _Rows):
        self.kernels, self.slots = rows, rows.slots
        self.inverse = invert(rows.slots.order)

    def gathered(self, source, matrices, bias):
        source = source.contiguous()
        return self.kernels.project_up(source, matrices, bias, "silu", [], kept=True, acted=False)[0]

    def rows(self, left, matrices, bias):
        return self.kernels.multiply(left, matrices, bias)

    def outer(self, left, right, like, gather):
        if gather == "neither":
            # the kernel gathers one of them: by slot, then
            return self.kernels.weight_gradient(left, right[self.inverse], like, gather_left=False, top_k=1)
        return self.kernels.weight_gradient(left.contiguous(), right.contiguous(), like, gather_left=gather == "left")

    def bias_gradient(self, rows, weight, like):
        return self.kernels.bias_gradient(rows, weight, like)

    def combine(self, rows, weight):
        return self.kernels.combine(rows, weight, self.inverse)


def forward(
    x, slots: Slots, weight, up, down, up_bias, down_bias, gate: str, constants, keep_h: bool, low_rank=None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The experts' weighted sum (T, H), added up in float32, and h, or (0, C) if it is not kept."""
    with torch.cuda.device_of(x):
        rows = _Rows(slots, weight.shape[1], x.element_size(), config)
        if low_rank is not None:
            arguments = (weight.contiguous(), up, down, up_bias, down_bias, gate, constants, keep_h, low_rank)
            return composed.forward(_Products(rows), x.contiguous(), *arguments)
        h, a = rows.project_up(x.contiguous(), up, up_bias, gate, constants, kept=keep_h, acted=True)
        y = rows.multiply(a, down, down_bias)
        out = rows.combine(y, weight.contiguous(), invert(slots.order))
    return out, x.new_empty(0, up.shape[1]) if h is None else h


def backward(
    grad, x, h, slots: Slots, weight, up, down, up_bias, down_bias, gate: str, constants, needs: list[bool],
    low_rank=None, config: Config | None = None,
) -> list[torch.Tensor | None]:  # fmt: skip
    """From grad, the gradients of x, weight, up, down, up_bias and down_bias, None where `needs` is False; with
    `low_rank` then those of its factors, as [`~modeling_moe.dispatch.loop.backward`] has them.

    Those of idle experts and of the weights of empty slots are 0. An h that was not kept is computed again.
    """
    grads: list[torch.Tensor | None] = [None] * 6
    needs_x, needs_weight, needs_up, needs_down, needs_up_bias, needs_down_bias = needs[:6]
    with torch.cuda.device_of(x):
        x, grad, weight = x.contiguous(), grad.contiguous(), weight.contiguous()
        rows = _Rows(slots, weight.shape[1], x.element_size(), config)
        if low_rank is not None:
            arguments = (weight, up, down, up_bias, down_bias, gate, constants, needs, low_rank)
            return composed.backward(_Products(rows), grad, x, h, *arguments)
        inverse = invert(slots.order)
        if not len(h):
            h, _ = rows.project_up(x, up, up_bias, "silu", [], kept=True, acted=False)
        wants = [needs_x or needs_up or needs_up_bias, needs_down, needs_weight]
        grad_h, scaled, grad_weight = rows.gate_backward(grad, h, weight, down, down_bias, gate, constants, wants)
        if needs_weight:
            served = inverse < slots.offsets[-1]
            grads[1] = torch.where(served, grad_weight.index_select(0, inverse), 0.0).view_as(weight)
        if needs_down:
            grads[3] = rows.weight_gradient(grad, scaled, down, gather_left=True)
            del scaled
        if needs_down_bias:
            grads[5] = rows.bias_gradient(grad, weight, down_bias)
        if needs_up:
            grads[2] = rows.weight_gradient(grad_h, x, up, gather_left=False)
        if needs_up_bias:
            grads[4] = rows.bias_gradient(grad_h, None, up_bias)
        if needs_x:
            grads[0] = rows.combine(rows.multiply(grad_h, up.transpose(1, 2), None), None, inverse)
    return grads


def _decode_blocks(contiguous: bool, columns: int, depth: int, products: int) -> dict[str, int]:
    """Blocks of 8192 products, to have enough loads in flight, which run along the matrix's stretches of memory."""
    block_n = columns if contiguous else 32
    block_k = min(8192 // (block_n * products), triton.next_power_of_2(depth))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4}


def decode(x, index, weight, up, down, up_bias, down_bias, gate: str, constants) -> torch.Tensor:
    """`forward` for a few tokens, without sorting or h: one matrix-vector product per slot, a (S, I) is float32.

    index (T, K) int64, an id outside [0, E) is an empty slot.
    """
    num_tokens, top_k = index.shape
    (num_experts, hidden, inner), out = down.shape, x.new_empty(x.shape)
    shape = {"HIDDEN": hidden, "INNER": inner, "TOP_K": top_k}
    with torch.cuda.device_of(x):
        index = index.contiguous()
        a = torch.empty(num_tokens * top_k, inner, dtype=torch.float32, device=x.device)
        blocks = _decode_blocks(up.stride(2) == 1, 16, hidden, up.shape[1] // inner)
        _launch(
            kernels.decode_up, (len(a), triton.cdiv(inner, blocks["BLOCK_N"])),
            x.contiguous(), index, up, *up.stride(), _contiguous(up_bias), a, num_experts,
            **shape, **_gate_options(gate, constants), **blocks,
        )  # fmt: skip
        blocks = _decode_blocks(down.stride(2) == 1, 8 if num_tokens <= 4 else 16, inner, 1)
        _launch(
            kernels.decode_down, (num_tokens, triton.cdiv(hidden, blocks["BLOCK_N"])),
            a, index, weight.contiguous(), down, *down.stride(), _contiguous(down_bias), out, num_experts,
            **shape, **blocks,
        )  # fmt: skip
    return out
