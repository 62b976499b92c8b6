# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The dispatch on a GPU, in Triton: float32, float16 and bfloat16. Without Triton its import is an ImportError.

# T tokens, K experts per token, S = T*K slots; E experts; H hidden, I expert width, C = I or 2I columns of h
# x, grad (T, H); h (S, C), in the order of slots.order, where rows of empty slots are neither written nor read
# weight (T, K) float32; up (E, C, H), down (E, H, I) of any strides; up_bias (E, C), down_bias (E, H) or None
# matrices and biases may be float32 beside x in 16 bits: casting.py
# gate: a key of gates.GATES; constants: what it takes, [alpha, limit] for the clamped ones, else []
# R rank of a low-rank update; `narrow` (S, R) is what its first matrix gives

Nothing waits for the device and nothing is added atomically: the same input gives the same bits.
"""

import functools
import warnings
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from ...low_rank import LowRank, LowRankPair
from ...token_order import Slots
from ...token_order import group_slots as by_torch
from .casting import cast
from .kernels import decoding, gradients, products, sorting
from .launching import launch, uninterrupted
from .tiles import DECODING, Config, Decoding, Tile, choose_config, family_of, precision_of, serves


INTERPRETED = not isinstance(products.combine, triton.JITFunction)
# slots that a program of the sort counts, more of them from so many slots on, and those it places at a time: each
# program reads the counts of all
SORT_BLOCK, LARGE_SORT_BLOCK, LARGE_SORT, SORT_STEP = 1024, 4096, 1 << 18, 128
# experts of a token whose second matrices decoding reads without a loop
DECODE_UNROLL = 8
# the most columns of a narrow product that one step of an update takes
RANK_BLOCK = 64


@torch.compiler.assume_constant_result
def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: a GPU that multiplies bfloat16, or anything if Triton is interpreted."""
    if INTERPRETED or device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETED
    # within the capture of a CUDA graph nothing may be read back; a pass before it, which warms up, has asked
    return serves(device) and (torch.cuda.is_current_stream_capturing() or _launches(device))


@functools.cache
def _launches(device: torch.device) -> bool:
    """Whether a kernel of the smallest kind really runs on `device`; says once why not."""
    try:
        with _disable_current_modes(), uninterrupted():
            offsets = group_slots(torch.tensor([1, 0, 1], device=device), 2).offsets.tolist()
    except Exception as error:  # compilers, drivers and launchers fail in as many ways as there are machines
        offsets = f"{type(error).__name__}: {error}"
    if offsets == [0, 1, 3]:
        return True
    warnings.warn(
        f"Triton does not work on {device} ({offsets}), so torch's grouped_mm computes the experts, slower and with "
        "more memory. Triton needs a C compiler and a driver that its ptxas is not newer than.",
        stacklevel=2,
    )
    return False


def _gate_options(gate: str) -> dict[str, str]:
    layout = "pairs" if gate.endswith("_pairs") else "halves" if gate.endswith("_gated") else "plain"
    return {"ACTIVATION": gate.removesuffix("_gated").removesuffix("_pairs"), "LAYOUT": layout}


def _gate_constants(constants: list[float]) -> tuple[float, float]:
    alpha, limit = (float(constant) for constant in constants or (0, 0))
    return alpha, limit


def _contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def group_slots(index: torch.Tensor, num_experts: int) -> Slots:
    """[`~modeling_moe.dispatch.token_order.group_slots`] in two launches."""
    index, number = index.contiguous(), index.numel()
    if not number:
        return by_torch(index, num_experts)
    block = SORT_BLOCK if number <= LARGE_SORT else LARGE_SORT_BLOCK
    blocks, bins = triton.cdiv(number, block), triton.next_power_of_2(num_experts + 1)
    order, offsets, counts = (
        torch.empty(size, dtype=torch.int32, device=index.device)
        for size in ((number,), (num_experts + 1,), (blocks, bins))
    )
    sizes = {"BLOCK": block, "BINS": bins}
    with torch.cuda.device_of(index):
        launch(sorting.count_slots, (blocks,), index, counts, number, num_experts, **sizes)
        launch(
            sorting.place_slots, (blocks,), index, counts, order, offsets, number, num_experts, blocks,
            STEP=SORT_STEP, ROWS=max(1, 8192 // bins), **sizes,
        )  # fmt: skip
    return Slots(order, offsets)


class _Update(NamedTuple):
    """What a kernel adds after its product: narrow (S, R) times each expert's factor (E, N, R), where dropout left it.

    Attributes:
        kept: bool (T, N) or (S, N) as the kernel wants it, or None.
    """

    narrow: torch.Tensor
    factor: torch.Tensor
    kept: torch.Tensor | None = None


def _update_arguments(update: _Update | None) -> tuple[list, dict]:
    """The kernels' arguments narrow, factor, its strides, rank and kept, and their options."""
    if update is None:
        return [None, None, 0, 0, 0, 0, None], {"STEPS": 0, "BLOCK_R": 16, "EVEN_R": True}
    narrow, factor, kept = update
    rank = factor.shape[2]
    block = min(RANK_BLOCK, max(16, triton.next_power_of_2(rank)))
    options = {"STEPS": triton.cdiv(rank, block), "BLOCK_R": block, "EVEN_R": rank % block == 0}
    mask = None if kept is None else kept.contiguous().view(torch.uint8)
    return [narrow, factor, *factor.stride(), rank, mask], options


class _Rows:
    """The rows in tiles, and the launches that run over them.

    Attributes:
        tiles: see triton_kernels/__init__.py; their number is a bound the host knows, not the tiles in use.
        inverse: (S,) int32, each slot's row.
    """

    def __init__(self, slots: Slots, top_k: int, down: torch.Tensor, dtype: torch.dtype, config: Config | None):
        self.slots, self.top_k = slots, top_k
        self.num_slots, self.num_experts = len(slots.order), len(slots.offsets) - 1
        self.precision = precision_of(dtype)
        family = family_of(slots.order.device)
        self.config = config or choose_config(self.num_slots, down.shape, dtype, family)
        block = self.config.block_of_rows()
        self.number = min(self.num_slots, triton.cdiv(self.num_slots, block) + self.num_experts)
        self.tiles = torch.empty(2 * self.number + 1, dtype=torch.int32, device=slots.order.device)
        self.inverse = torch.empty_like(slots.order)
        sizes = {"BLOCK": 1024, "TILES": 32, "EXPERTS": max(16, triton.next_power_of_2(self.num_experts))}
        programs = max(triton.cdiv(self.num_slots, sizes["BLOCK"]), triton.cdiv(self.number, sizes["TILES"]))
        launch(
            sorting.map_rows, (programs,),
            *slots, self.inverse, self.tiles, self.num_slots, self.number, self.num_experts, BLOCK_M=block, **sizes,
        )  # fmt: skip

    def _grid(self, columns: int, tile: Tile) -> tuple[int]:
        return (self.number * triton.cdiv(columns, tile.BLOCK_N),)

    def _options(self, tile: Tile, columns: int, depth: int) -> dict:
        even = depth % tile.BLOCK_K == 0
        sizes = {"EVEN_K": even, "EVEN": even and columns % tile.BLOCK_N == 0}
        return {"TOP_K": self.top_k, "PRECISION": self.precision, **sizes, **tile.options()}

    def project_up(
        self, x, up, up_bias, gate, constants, kept: bool, acted: bool, update: _Update | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """h (S, C) if `kept`, and a (S, I) if `acted`; else the gate, which decides what I is, should be a plain one."""
        tile = self.config.up if acted else self.config.down.shrunk(up.shape[1])
        return self._project_up(tile, x, up, up_bias, gate, constants, kept, acted, update)

    def _project_up(self, tile, x, up, up_bias, gate, constants, kept, acted, update):
        gate_options = _gate_options(gate)
        inner, hidden = up.shape[1] // (1 if gate_options["LAYOUT"] == "plain" else 2), x.shape[1]
        h = x.new_empty(self.num_slots, up.shape[1]) if kept else None
        a = x.new_empty(self.num_slots, inner) if acted else None
        (*arguments, _), options = _update_arguments(update)
        launch(
            products.project_up, self._grid(inner, tile),
            x, *self.slots, self.tiles, self.number, up, *up.stride(), _contiguous(up_bias), *arguments, h, a,
            hidden, inner, *_gate_constants(constants), **gate_options, **options, **self._options(tile, inner, hidden),
        )  # fmt: skip
        return h, a

    def gathered_narrow(self, source, matrices) -> torch.Tensor:
        """Each row's token of source (T, N) times the expert's matrix (E, R, N): (S, R)."""
        tile = self.config.narrow.shrunk(matrices.shape[1])
        return self._project_up(tile, source, matrices, None, "silu", [], True, False, None)[0]

    def narrow(self, left, matrices) -> torch.Tensor:
        """left (S, N) times each expert's matrix (E, R, N): (S, R)."""
        return self._multiply(self.config.narrow.shrunk(matrices.shape[1]), left, matrices, None, None)

    def multiply(self, left, weight, bias, update: _Update | None = None) -> torch.Tensor:
        """left (S, N) times each expert's weight (E, M, N), plus bias (E, M): (S, M)."""
        tile = self.config.down
        stored = weight if weight.stride(2) == 1 else weight.transpose(1, 2)
        if self.config.persistent and update is None and _has_descriptor(left, stored):
            return self._multiply_persistent(tile, left, stored, bias, transposed=stored is not weight)
        if update is not None and update.kept is not None:
            # a dropped update needs an accumulator of its own
            tile = tile.shrunk(tile.BLOCK_N // 2)
        return self._multiply(tile, left, weight, bias, update)

    def _multiply(self, tile, left, weight, bias, update) -> torch.Tensor:
        (_, n, k), out = weight.shape, left.new_empty(self.num_slots, weight.shape[1])
        arguments, options = _update_arguments(update)
        launch(
            products.multiply, self._grid(n, tile),
            left, *self.slots, self.tiles, self.number, weight, *weight.stride(), _contiguous(bias), *arguments, out,
            n, k, **options, **self._options(tile, n, k),
        )  # fmt: skip
        return out

    def _multiply_persistent(self, tile, left, stored, bias, transposed: bool) -> torch.Tensor:
        """`multiply` by `stored`, each expert's weight (E, M, N), or (E, N, M) if `transposed`."""
        n, k = stored.shape[:0:-1] if transposed else stored.shape[1:]
        block = [1, tile.BLOCK_K, tile.BLOCK_N] if transposed else [1, tile.BLOCK_N, tile.BLOCK_K]
        out = left.new_empty(self.num_slots, n)
        launch(
            products.multiply_persistent, (_multiprocessors(left.device),),
            TensorDescriptor.from_tensor(left, [tile.BLOCK_M, tile.BLOCK_K]), self.slots.offsets, self.tiles,
            self.number, TensorDescriptor.from_tensor(stored, block), _contiguous(bias), out, n, k,
            TRANSPOSED=transposed, PRECISION=self.precision, **tile.options(),
        )  # fmt: skip
        return out

    def combine(self, y, weight) -> torch.Tensor:
        """y (S, H) -> (T, H), each token's rows times weight (T, K), or once if it is None, added up in float32."""
        out = y.new_empty(self.num_slots // self.top_k, y.shape[1])
        block = min(1024, triton.next_power_of_2(y.shape[1]))
        launch(
            products.combine, (len(out), triton.cdiv(y.shape[1], block)),
            y, self.inverse, self.slots.offsets, self.num_experts, weight, out, y.shape[1],
            TOP_K=self.top_k, BLOCK_N=block,
        )  # fmt: skip
        return out

    def gate_backward(self, grad, h, weight, down, down_bias, gate, constants, wants, update=None) -> list:
        """What is wanted of: h's gradient (S, C), weight * a (S, I), and the gradient of each row's weight (S,)."""
        if not any(wants):
            return [None] * 3
        (hidden, inner), tile = down.shape[1:], self.config.gate
        parts = triton.cdiv(inner, tile.BLOCK_N)
        grad_h = torch.empty_like(h) if wants[0] else None
        scaled = h.new_empty(self.num_slots, inner) if wants[1] else None
        grad_weight = None
        if wants[2]:
            shape = (parts + (down_bias is not None), self.num_slots)
            grad_weight = torch.empty(shape, dtype=torch.float32, device=h.device)
        rows = (grad, *self.slots, self.tiles, self.number)
        arguments, options = _update_arguments(update)
        options |= _gate_options(gate) | self._options(tile, inner, hidden)
        launch(
            gradients.gate_backward, self._grid(inner, tile),
            *rows, down, *down.stride(), *arguments, h, weight, grad_h, scaled, grad_weight, self.num_slots,
            hidden, inner, *_gate_constants(constants), EVEN_N=inner % tile.BLOCK_N == 0, **options,
        )  # fmt: skip
        if grad_weight is not None and down_bias is not None:
            launch(
                gradients.dot_bias, (self.number,),
                *rows, _contiguous(down_bias), grad_weight, parts, self.num_slots, hidden,
                TOP_K=self.top_k, EVEN_K=hidden % 64 == 0, BLOCK_M=tile.BLOCK_M, BLOCK_K=64,
            )  # fmt: skip
        return [grad_h, scaled, None if grad_weight is None else grad_weight.sum(0)]

    def weight_gradient(self, left, right, like, gather: str) -> torch.Tensor:
        """Each expert's left^T right, like `like` (E, M, N); `gather` says which of left and right is (T, .) rather
        than (S, .): "left", "right" or "neither"."""
        out, (_, m, n) = torch.empty_like(like), like.shape
        tile = self.config.gradient.shrunk(n, m)
        if gather == "neither":
            # no rows' numbers are fetched ahead, so all stages are buffers
            tile = tile._replace(num_stages=tile.num_stages - 2)
        launch(
            gradients.weight_gradient, (len(out) * triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N),),
            left, right, *self.slots, out, *out.stride(), m, n,
            TOP_K=self.top_k, GATHER=gather, PRECISION=self.precision, **tile.options(),
        )  # fmt: skip
        return out

    def bias_gradient(self, values, weight, parameter) -> torch.Tensor:
        """Each expert's sum of values (S, N), or of weight (T, K) times values (T, N), like `parameter` (E, N)."""
        out = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        launch(
            gradients.bias_gradient, (len(out), triton.cdiv(out.shape[1], 64)),
            values, *self.slots, weight, out, out.shape[1], TOP_K=self.top_k, BLOCK_M=32, BLOCK_N=64,
        )  # fmt: skip
        return out


def _has_descriptor(left: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether the bulk copy engine takes both: a stretch of memory in the last dimension, the others in 16-byte steps."""
    steps = [left.stride(0), *stored.stride()[:-1]]
    aligned = all(step * left.element_size() % 16 == 0 for step in steps) and stored.data_ptr() % 16 == 0
    return stored.stride(-1) == 1 and aligned


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


class _LowRank:
    """A low-rank update of one of the two matrices, in the dtype of the products, with its gradients.

    Attributes:
        a: (E, R, M).
        b: (E, N, R), with the update's scaling in it, so that no product has to be scaled.
        gathered: whether its input is (T, M), a row for each token, rather than (S, M).
        kept: what dropout leaves of the input, as it is gathered, or None.
    """

    def __init__(self, low_rank: LowRank, rows: _Rows, dtype: torch.dtype, gathered: bool):
        self.low_rank, self.kernels, self.gathered = low_rank, rows, gathered
        # PEFT's b lies with the experts last, one number of an expert in each stretch of memory
        b = low_rank.b if low_rank.scaling == 1 else low_rank.b * low_rank.scaling
        self.a, self.b = low_rank.a.to(dtype).contiguous(), b.to(dtype).contiguous()
        self.kept = low_rank.kept

    def _dropped(self, source: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            return source
        return source * (self.kept if self.gathered else self.kept.index_select(0, self.kernels.slots.order))

    def _narrow(self, dropped: torch.Tensor) -> torch.Tensor:
        """a times what dropout left of the input: (S, R)."""
        multiply = self.kernels.gathered_narrow if self.gathered else self.kernels.narrow
        return multiply(dropped, self.a)

    def forward(self, source: torch.Tensor) -> _Update:
        """What the product of `source` with the matrix has to add."""
        return _Update(self._narrow(self._dropped(source)), self.b)

    def backward(self, grad: torch.Tensor) -> _Update:
        """What the product of the output's gradient with the matrix has to add; (S, N) if `gathered`, else (T, N)."""
        multiply = self.kernels.narrow if self.gathered else self.kernels.gathered_narrow
        self.grad_narrow = multiply(grad, self.b.transpose(1, 2))
        return _Update(self.grad_narrow, self.a.transpose(1, 2), self.kept)

    def gradients(self, grad: torch.Tensor, source: torch.Tensor, needs: list[bool]) -> list[torch.Tensor | None]:
        """Those of a and b; `source` of an update that does not gather carries the row's weight."""
        low_rank, grad_a, grad_b = self.low_rank, None, None
        if not any(needs):
            return [None, None]
        dropped = self._dropped(source)
        if needs[0]:
            side = "right" if self.gathered else "neither"
            grad_a = self.kernels.weight_gradient(self.grad_narrow, dropped, low_rank.a, side)
        if needs[1]:
            side = "neither" if self.gathered else "left"
            grad_b = self.kernels.weight_gradient(grad, self._narrow(dropped), low_rank.b, side).mul_(low_rank.scaling)
        return [grad_a, grad_b]


def _low_ranks(
    low_rank: LowRankPair | None, rows: _Rows, dtype: torch.dtype
) -> tuple[_LowRank | None, _LowRank | None]:
    up, down = low_rank or (None, None)
    return up and _LowRank(up, rows, dtype, gathered=True), down and _LowRank(down, rows, dtype, gathered=False)


def forward(
    x, slots: Slots, weight, up, down, up_bias, down_bias, gate: str, constants, keep_h: bool, low_rank=None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The experts' weighted sum (T, H), added up in float32, and h, or (0, C) if it is not kept."""
    with torch.cuda.device_of(x):
        x, rows = x.contiguous(), _Rows(slots, weight.shape[1], down, x.dtype, config)
        up_update, down_update = _low_ranks(low_rank, rows, x.dtype)
        update = up_update and up_update.forward(x)
        cast_up = cast(up, x.dtype)
        h, a = rows.project_up(x, cast_up, up_bias, gate, constants, kept=keep_h, acted=True, update=update)
        del cast_up
        y = rows.multiply(a, cast(down, x.dtype), down_bias, down_update and down_update.forward(a))
        out = rows.combine(y, weight.contiguous())
    return out, x.new_empty(0, up.shape[1]) if h is None else h


def backward(
    grad, x, h, slots: Slots, weight, up, down, up_bias, down_bias, gate: str, constants, needs: list[bool],
    low_rank=None, config: Config | None = None,
) -> list[torch.Tensor | None]:  # fmt: skip
    """From grad, the gradients of x, weight, up, down, up_bias and down_bias, None where `needs` is False; with
    `low_rank` then those of its factors, as [`~modeling_moe.dispatch.backends.loop.backward`] has them.

    Those of idle experts and of the weights of empty slots are 0. An h that was not kept is computed again.
    """
    grads: list[torch.Tensor | None] = [None] * 10
    needs_x, needs_weight, needs_up, needs_down, needs_up_bias, needs_down_bias, *needs_factors = needs
    needs_up_factors, needs_down_factors = needs_factors[:2], needs_factors[2:]
    with torch.cuda.device_of(x):
        x, grad, weight = x.contiguous(), grad.contiguous(), weight.contiguous()
        rows = _Rows(slots, weight.shape[1], down, x.dtype, config)
        up_update, down_update = _low_ranks(low_rank, rows, x.dtype)
        cast_up, cast_down = cast(up, x.dtype), cast(down, x.dtype)
        if not len(h):
            update = up_update and up_update.forward(x)
            h, _ = rows.project_up(x, cast_up, up_bias, "silu", [], kept=True, acted=False, update=update)
        wants = [
            needs_x or needs_up or needs_up_bias or any(needs_up_factors),
            needs_down or any(needs_down_factors),
            needs_weight,
        ]
        update = down_update and down_update.backward(grad)
        grad_h, scaled, grad_weight = rows.gate_backward(
            grad, h, weight, cast_down, down_bias, gate, constants, wants, update
        )
        del cast_down
        if needs_weight:
            served = rows.inverse < slots.offsets[-1]
            grads[1] = torch.where(served, grad_weight.index_select(0, rows.inverse), 0.0).view_as(weight)
        if needs_down:
            grads[3] = rows.weight_gradient(grad, scaled, down, "left")
        if down_update is not None:
            grads[8:] = down_update.gradients(grad, scaled, needs_down_factors)
        del scaled
        if needs_down_bias:
            grads[5] = rows.bias_gradient(grad, weight, down_bias)
        if needs_up:
            grads[2] = rows.weight_gradient(grad_h, x, up, "right")
        if needs_up_bias:
            grads[4] = rows.bias_gradient(grad_h, None, up_bias)
        update = None
        if up_update is not None and (needs_x or any(needs_up_factors)):
            update = up_update.backward(grad_h)
            grads[6:8] = up_update.gradients(grad_h, x, needs_up_factors)
        if needs_x:
            grads[0] = rows.combine(rows.multiply(grad_h, cast_up.transpose(1, 2), None, update), None)
    return grads


def _decode_blocks(contiguous: bool, rows: int, depth: int, per_block: int, num_warps: int) -> dict[str, int]:
    """Blocks of 8192 numbers along the matrix's stretches of memory, of half as many across them."""
    block_n, numbers = (rows, 8192) if contiguous else (32, 4096)
    block_k = min(numbers // (block_n * per_block), triton.next_power_of_2(depth))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps}


def decode(
    x, index, weight, up, down, up_bias, down_bias, gate: str, constants, decoding_blocks: Decoding | None = None
) -> torch.Tensor:
    """`forward` for a few tokens, without sorting or h: one matrix-vector product per slot, a (S, I) is float32.

    index (T, K) int64, an id outside [0, E) is an empty slot.
    """
    num_tokens, top_k = index.shape
    (num_experts, hidden, inner), out = down.shape, x.new_empty(x.shape)
    chosen = decoding_blocks or DECODING[family_of(x.device)]
    with torch.cuda.device_of(x):
        index = index.contiguous()
        a = torch.empty(num_tokens * top_k, inner, dtype=torch.float32, device=x.device)
        blocks = _decode_blocks(up.stride(2) == 1, chosen.up, hidden, up.shape[1] // inner, chosen.num_warps)
        even = hidden % blocks["BLOCK_K"] == 0 and inner % blocks["BLOCK_N"] == 0
        launch(
            decoding.decode_up, (len(a), triton.cdiv(inner, blocks["BLOCK_N"])),
            x.contiguous(), index, up, *up.stride(), _contiguous(up_bias), a, num_experts, hidden, inner,
            *_gate_constants(constants), TOP_K=top_k, EVEN=even, **_gate_options(gate), **blocks,
        )  # fmt: skip
        rows = chosen.down if num_tokens <= chosen.few else chosen.down_many
        blocks = _decode_blocks(down.stride(2) == 1, rows, inner, 1, chosen.num_warps)
        launch(
            decoding.decode_down, (num_tokens, triton.cdiv(hidden, blocks["BLOCK_N"])),
            a, index, weight.contiguous(), down, *down.stride(), _contiguous(down_bias), out, num_experts, hidden,
            inner, TOP_K=top_k, UNROLL=min(top_k, DECODE_UNROLL), **blocks,
        )  # fmt: skip
    return out
