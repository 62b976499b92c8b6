# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""RowTiles launches the Triton kernels that work on the rows of one expert order.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
# C columns of the first projection; R rank of a low-rank update; N rows and M columns of an expert's matrix
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ...expert_order import ExpertOrder
from ...low_rank import Addition
from ...problem import ExpertsProblem
from .kernels import gradients, products, sorting
from .launching import launch, strides_of
from .tiles import Config, Tile, choose_config, family_of, precision_of


Side = Literal["left", "right", "neither"]
# the most columns of a rank that one step of a kernel adds
RANK_BLOCK = 64


def activation_options(name: str) -> dict[str, str]:
    """Returns the kernels' constants for a key of [`~modeling_moe.dispatch.activations.ACTIVATIONS`]."""
    layout = "pairs" if name.endswith("_pairs") else "halves" if name.endswith("_gated") else "plain"
    return {"ACTIVATION": name.removesuffix("_gated").removesuffix("_pairs"), "LAYOUT": layout}


def activation_constants(constants: Sequence[float]) -> dict[str, float]:
    """Returns the kernels' arguments for the constants of an activation."""
    alpha, limit = (float(constant) for constant in constants or (0, 0))
    return {"alpha": alpha, "limit": limit}


def contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a bias as the kernels read it."""
    return None if bias is None else bias.contiguous()


class _AdditionArguments(NamedTuple):
    """_AdditionArguments holds what a kernel is given to add a low-rank update.

    Attributes:
        arguments: narrow, factor with its strides, and rank.
        options: the constants STEPS, BLOCK_R and EVEN_R.
        kept: (T, M) or (A, M) bytes, 0 where dropout hides an element, or None.
    """

    arguments: dict[str, Any]
    options: dict[str, Any]
    kept: torch.Tensor | None


def _addition_arguments(addition: Addition | None) -> _AdditionArguments:
    if addition is None:
        nothing = {"narrow": None, "factor": None, "factor_e": 0, "factor_n": 0, "factor_r": 0, "rank": 0}
        return _AdditionArguments(nothing, {"STEPS": 0, "BLOCK_R": 16, "EVEN_R": True}, None)
    factor, kept = addition.factor, addition.kept
    rank = factor.shape[2]
    block = min(RANK_BLOCK, max(16, triton.next_power_of_2(rank)))
    return _AdditionArguments(
        {"narrow": addition.narrow, "factor": factor, **strides_of("factor", "enr", factor), "rank": rank},
        {"STEPS": triton.cdiv(rank, block), "BLOCK_R": block, "EVEN_R": rank % block == 0},
        None if kept is None else kept.contiguous().view(torch.uint8),
    )


class Projection(NamedTuple):
    """Projection is the result of `RowTiles.project_up`. A tensor that was not asked for is None.

    Attributes:
        h: (A, C).
        acted: (A, I).
    """

    h: torch.Tensor | None
    acted: torch.Tensor | None


class RowGradients(NamedTuple):
    """RowGradients is the result of `RowTiles.activation_backward`. A tensor that was not asked for is None.

    Attributes:
        h: (A, C), the gradient of h.
        scaled: (A, I), the activations times the combine weights.
        weight: (A,), the gradient of each row's combine weight.
    """

    h: torch.Tensor | None = None
    scaled: torch.Tensor | None = None
    weight: torch.Tensor | None = None


class RowTiles:
    """RowTiles cuts the rows into tiles and launches the kernels that run over the tiles.

    Args:
        problem: gives the shapes and the dtype.
        order: the expert order of the rows.
        config: the tiles' sizes, chosen by [`~modeling_moe.dispatch.backends.triton.tiles.choose_config`] if None.

    Attributes:
        number: a bound on the number of tiles that the host knows.
        tiles: the table of tiles, which the docstring of [`~modeling_moe.dispatch.backends.triton.kernels`] describes.
        inverse: (A,) int32, the row of each assignment.
    """

    def __init__(self, problem: ExpertsProblem, order: ExpertOrder, config: Config | None):
        self.order, self.top_k = order, problem.top_k
        self.rows, self.num_experts = len(order.assignment), len(order.offsets) - 1
        device, dtype = order.assignment.device, problem.x.dtype
        self.precision = precision_of(dtype)
        self.config = config or choose_config(self.rows, problem.down.shape, dtype, family_of(device))
        block = self.config.block_of_rows()
        self.number = min(self.rows, triton.cdiv(self.rows, block) + self.num_experts)
        self.tiles = torch.empty(2 * self.number + 1, dtype=torch.int32, device=device)
        self.inverse = torch.empty_like(order.assignment)
        sizes = {"BLOCK": 1024, "TILES": 32, "EXPERTS": max(16, triton.next_power_of_2(self.num_experts))}
        programs = max(triton.cdiv(self.rows, sizes["BLOCK"]), triton.cdiv(self.number, sizes["TILES"]))
        self.order_arguments = {"order": order.assignment, "offsets": order.offsets}
        self.tile_arguments = {**self.order_arguments, "tiles": self.tiles, "num_tiles": self.number}
        launch(
            sorting.map_rows,
            (programs,),
            {"BLOCK_M": block, **sizes},
            **self.tile_arguments,
            inverse=self.inverse,
            num_assignments=self.rows,
            num_experts=self.num_experts,
        )

    def _grid(self, columns: int, tile: Tile) -> tuple[int]:
        return (self.number * triton.cdiv(columns, tile.BLOCK_N),)

    def _options(self, tile: Tile, columns: int, depth: int) -> dict[str, Any]:
        even = depth % tile.BLOCK_K == 0
        sizes = {"EVEN_K": even, "EVEN": even and columns % tile.BLOCK_N == 0}
        return {"TOP_K": self.top_k, "PRECISION": self.precision, **sizes, **tile.options()}

    def project_up(
        self, problem: ExpertsProblem, up: torch.Tensor, kept: bool, acted: bool, addition: Addition | None
    ) -> Projection:
        """Computes h and the activations.

        Args:
            problem: gives x, the bias and the activation.
            up: (E, C, H), the matrices in the dtype of the products.
            kept: True to write h.
            acted: True to write the activations. Without them the kernel takes a plain activation, whose width is C.
            addition: the part of a low-rank update, or None.
        """
        tile = self.config.up if acted else self.config.down.shrunk(up.shape[1])
        name, constants = (problem.activation, problem.constants) if acted else ("silu", [])
        return self._project_up(tile, problem.x, up, problem.up_bias, name, constants, kept, acted, addition)

    def _project_up(
        self,
        tile: Tile,
        x: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str,
        constants: Sequence[float],
        kept: bool,
        acted: bool,
        addition: Addition | None,
    ) -> Projection:
        options = activation_options(activation)
        inner, hidden = up.shape[1] // (1 if options["LAYOUT"] == "plain" else 2), x.shape[1]
        h = x.new_empty(self.rows, up.shape[1]) if kept else None
        a = x.new_empty(self.rows, inner) if acted else None
        update = _addition_arguments(addition)
        launch(
            products.project_up,
            self._grid(inner, tile),
            {**options, **update.options, **self._options(tile, inner, hidden)},
            x=x,
            **self.tile_arguments,
            up=up,
            **strides_of("stride", "ech", up),
            bias=contiguous(bias),
            **update.arguments,
            h=h,
            a=a,
            hidden=hidden,
            inner=inner,
            **activation_constants(constants),
        )
        return Projection(h, a)

    def gathered_narrow(self, source: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Multiplies each row's token of `source` (T, N) by its expert's matrix (E, R, N): (A, R)."""
        tile = self.config.narrow.shrunk(matrices.shape[1])
        product = self._project_up(tile, source, matrices, None, "silu", [], True, False, None).h
        assert product is not None  # it was asked for
        return product

    def narrow(self, left: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Multiplies each row of `left` (A, N) by its expert's matrix (E, R, N): (A, R)."""
        return self._multiply(self.config.narrow.shrunk(matrices.shape[1]), left, matrices, None, None)

    def multiply(
        self, left: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addition: Addition | None = None
    ) -> torch.Tensor:
        """Multiplies each row of `left` (A, M) by its expert's matrix (E, N, M) and adds the bias (E, N): (A, N)."""
        tile = self.config.down
        stored = weight if weight.stride(2) == 1 else weight.transpose(1, 2)
        if self.config.persistent and addition is None and _has_descriptor(left, stored):
            return self._multiply_persistent(tile, left, stored, bias, transposed=stored is not weight)
        if addition is not None and addition.kept is not None:
            # an update with dropout needs an accumulator of its own
            tile = tile.shrunk(tile.BLOCK_N // 2)
        return self._multiply(tile, left, weight, bias, addition)

    def _multiply(
        self,
        tile: Tile,
        left: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        addition: Addition | None,
    ) -> torch.Tensor:
        (_, n, k), out = weight.shape, left.new_empty(self.rows, weight.shape[1])
        update = _addition_arguments(addition)
        launch(
            products.multiply,
            self._grid(n, tile),
            {**update.options, **self._options(tile, n, k)},
            left=left,
            **self.tile_arguments,
            weight=weight,
            **strides_of("stride", "enk", weight),
            bias=contiguous(bias),
            **update.arguments,
            kept=update.kept,
            out=out,
            n=n,
            k=k,
        )
        return out

    def _multiply_persistent(
        self, tile: Tile, left: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None, transposed: bool
    ) -> torch.Tensor:
        """Multiplies by `stored`, each expert's matrix (E, N, M), or (E, M, N) if `transposed`."""
        n, k = (stored.shape[2], stored.shape[1]) if transposed else (stored.shape[1], stored.shape[2])
        block = [1, tile.BLOCK_K, tile.BLOCK_N] if transposed else [1, tile.BLOCK_N, tile.BLOCK_K]
        out = left.new_empty(self.rows, n)
        launch(
            products.multiply_persistent,
            (_multiprocessors(left.device),),
            {"TRANSPOSED": transposed, "PRECISION": self.precision, **tile.options()},
            left=TensorDescriptor.from_tensor(left, [tile.BLOCK_M, tile.BLOCK_K]),
            offsets=self.order.offsets,
            tiles=self.tiles,
            num_tiles=self.number,
            weight=TensorDescriptor.from_tensor(stored, block),
            bias=contiguous(bias),
            out=out,
            n=n,
            k=k,
        )
        return out

    def combine(self, y: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Sums each token's rows of `y` (A, H) in fp32, times `weight` (T, K) if it is given: (T, H)."""
        out = y.new_empty(self.rows // self.top_k, y.shape[1])
        block = min(1024, triton.next_power_of_2(y.shape[1]))
        launch(
            products.combine,
            (len(out), triton.cdiv(y.shape[1], block)),
            {"TOP_K": self.top_k, "BLOCK_N": block},
            y=y,
            inverse=self.inverse,
            offsets=self.order.offsets,
            num_experts=self.num_experts,
            weight=weight,
            out=out,
            hidden=y.shape[1],
        )
        return out

    def activation_backward(
        self,
        problem: ExpertsProblem,
        grad: torch.Tensor,
        h: torch.Tensor,
        down: torch.Tensor,
        wanted: tuple[bool, bool, bool],
        addition: Addition | None = None,
    ) -> RowGradients:
        """Computes the gradients behind the second matrices.

        Args:
            problem: gives the combine weights, the bias and the activation.
            grad: (T, H), the gradient of the output.
            h: (A, C).
            down: (E, H, I), the matrices in the dtype of the products.
            wanted: for each field of [`RowGradients`], True to compute it.
            addition: the part of a low-rank update, or None.
        """
        if not any(wanted):
            return RowGradients()
        wants_h, wants_scaled, wants_weight = wanted
        (hidden, inner), tile = down.shape[1:], self.config.gate
        parts, biased = triton.cdiv(inner, tile.BLOCK_N), problem.down_bias is not None
        grad_h = torch.empty_like(h) if wants_h else None
        scaled = h.new_empty(self.rows, inner) if wants_scaled else None
        grad_weight = None
        if wants_weight:
            grad_weight = torch.empty(parts + biased, self.rows, dtype=torch.float32, device=h.device)
        update = _addition_arguments(addition)
        options = {**update.options, **activation_options(problem.activation), **self._options(tile, inner, hidden)}
        launch(
            gradients.gate_backward,
            self._grid(inner, tile),
            {"EVEN_N": inner % tile.BLOCK_N == 0, **options},
            grad=grad,
            **self.tile_arguments,
            down=down,
            **strides_of("stride", "ehi", down),
            **update.arguments,
            kept=update.kept,
            h=h,
            weight=problem.weight,
            grad_h=grad_h,
            scaled=scaled,
            grad_weight=grad_weight,
            num_assignments=self.rows,
            hidden=hidden,
            inner=inner,
            **activation_constants(problem.constants),
        )
        if grad_weight is not None and problem.down_bias is not None:
            self._dot_bias(grad, problem.down_bias, grad_weight, parts)
        return RowGradients(grad_h, scaled, None if grad_weight is None else grad_weight.sum(0))

    def _dot_bias(self, grad: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, part: int) -> None:
        """Writes each row's <grad, bias> to `out[part]` (A,)."""
        hidden, block = grad.shape[1], 64
        launch(
            gradients.dot_bias,
            (self.number,),
            {
                "TOP_K": self.top_k,
                "EVEN_K": hidden % block == 0,
                "BLOCK_M": self.config.gate.BLOCK_M,
                "BLOCK_K": block,
            },
            grad=grad,
            **self.tile_arguments,
            bias=contiguous(bias),
            out=out,
            part=part,
            num_assignments=self.rows,
            hidden=hidden,
        )

    def weight_gradient(
        self, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor, gather: Side
    ) -> torch.Tensor:
        """Computes leftᵀ right over each expert's rows, 0 for an idle expert.

        Args:
            left: (A, N), or (T, N) if it is gathered.
            right: (A, M), or (T, M) if it is gathered.
            like: (E, N, M), gives the dtype and the strides of the result.
            gather: the side that has one row per token rather than one per assignment.
        """
        out, (_, m, n) = torch.empty_like(like), like.shape
        tile = self.config.gradient.shrunk(n, m)
        if gather == "neither":
            # no assignments are fetched ahead, so all stages are buffers
            tile = tile._replace(num_stages=tile.num_stages - 2)
        launch(
            gradients.weight_gradient,
            (len(out) * triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N),),
            {"TOP_K": self.top_k, "GATHER": gather, "PRECISION": self.precision, **tile.options()},
            left=left,
            right=right,
            **self.order_arguments,
            out=out,
            **strides_of("stride", "emn", out),
            num_m=m,
            num_n=n,
        )
        return out

    def bias_gradient(self, values: torch.Tensor, weight: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Sums each expert's values (A, N), or `weight` (T, K) times `values` (T, N): like `like` (E, N)."""
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        launch(
            gradients.bias_gradient,
            (len(out), triton.cdiv(out.shape[1], 64)),
            {"TOP_K": self.top_k, "BLOCK_M": 32, "BLOCK_N": 64},
            values=values,
            **self.order_arguments,
            weight=weight,
            out=out,
            n=out.shape[1],
        )
        return out


def _has_descriptor(left: torch.Tensor, stored: torch.Tensor) -> bool:
    """Returns True if the bulk copy engine takes both: a contiguous last dimension, and 16-byte steps in the others."""
    steps = [left.stride(0), *stored.stride()[:-1]]
    aligned = all(step * left.element_size() % 16 == 0 for step in steps) and stored.data_ptr() % 16 == 0
    return stored.stride(-1) == 1 and aligned


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
