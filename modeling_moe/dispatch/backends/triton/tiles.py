# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module chooses the blocks of the Triton kernels by the GPU, the dtype and the number of rows per expert."""

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from packaging.version import Version


class Tile(NamedTuple):
    """Tile is a block of a kernel's output, the step of the kernel's inner loop, and the schedule.

    Attributes:
        BLOCK_M: rows of the block.
        BLOCK_N: columns of the block.
        BLOCK_K: step of the inner loop.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        maxnreg: the most registers of a thread (NVIDIA), or None. A limit allows more programs at a time, with spills.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        """Returns the constants of a launch."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def shrunk(self, columns: int, rows: int | None = None) -> "Tile":
        """Returns a tile that is no wider than a matrix of so many columns, and no higher than its rows if given.

        Its sides are powers of 2 of at least 16, which matrix instructions need.
        """
        wide = min(self.BLOCK_N, max(16, triton.next_power_of_2(columns)))
        high = self.BLOCK_M if rows is None else min(self.BLOCK_M, max(16, triton.next_power_of_2(rows)))
        return self._replace(BLOCK_M=high, BLOCK_N=wide)


class Config(NamedTuple):
    """Config holds the tiles of the matrix products. All but `gradient` run over the same blocks of rows: one BLOCK_M.

    Attributes:
        up: tile of the activations, with their columns of h.
        down: tile of the products with the second matrices, and in backward of the gradient of x.
        gate: tile of the gradient of the activations.
        gradient: tile of the gradients of the matrices.
        narrow: tile of a product with a low-rank update's first factor, whose rank bounds BLOCK_N.
        persistent: True to compute the products of `down` by `multiply_persistent`, where strides allow it.
    """

    up: Tile
    down: Tile
    gate: Tile
    gradient: Tile
    narrow: Tile
    persistent: bool = False

    def block_of_rows(self) -> int:
        """Returns the BLOCK_M of all tiles that run over blocks of rows.

        Raises:
            ValueError: if the tiles have several BLOCK_M, with which rows would be left out.
        """
        blocks = {tile.BLOCK_M for tile in (self.up, self.down, self.gate, self.narrow)}
        if len(blocks) > 1:
            raise ValueError(
                f"up, down, gate and narrow run over the same blocks of rows: make BLOCK_M one of {blocks}."
            )
        return blocks.pop()


class Decoding(NamedTuple):
    """Decoding holds the blocks of the matrix-vector products. They are large enough to have enough loads in flight.

    Attributes:
        up: rows of the first matrices that a program reads.
        down: rows of the second matrices that a program reads, for up to `few` tokens.
        down_many: the rows for more tokens.
        few: the most tokens for which `down` is taken.
        num_warps: warps of a program.
    """

    up: int = 16
    down: int = 8
    down_many: int = 16
    few: int = 4
    num_warps: int = 4


Table = list[tuple[float, Config]]

# family of GPUs -> the shared memory in KiB that tiles may take
FAMILIES = {"hopper": 227, "ampere": 99, "cdna": 64}

# family -> kind of numbers -> (the most rows per expert on average, the tiles). hopper: Hopper and Blackwell
# data-centre GPUs, whose matrix units read shared memory. ampere: every other NVIDIA GPU from Ampere on. cdna: AMD's MI300.
# A stage is a buffer, but `gradient`, which fetches assignments ahead, has two buffers fewer than stages; on ampere and
# cdna all have one fewer. tests/dispatch/test_compilation.py compiles each for its GPUs.
# fmt: off
CONFIGS: dict[str, dict[str, Table]] = {
    "hopper": {
        "16bit": [
            (16, Config(up=Tile(16, 64, 128, 4, 3), down=Tile(16, 64, 128, 4, 4), gate=Tile(16, 64, 128, 4, 3),
                        gradient=Tile(128, 128, 16, 8, 5), narrow=Tile(16, 64, 128, 4, 4))),
            (32, Config(up=Tile(32, 64, 128, 4, 3), down=Tile(32, 64, 128, 4, 4), gate=Tile(32, 64, 128, 4, 3),
                        gradient=Tile(128, 128, 32, 8, 5), narrow=Tile(32, 64, 128, 4, 4))),
            (160, Config(up=Tile(64, 64, 64, 4, 4), down=Tile(64, 128, 64, 4, 4), gate=Tile(64, 64, 64, 4, 4),
                         gradient=Tile(128, 128, 64, 8, 5), narrow=Tile(64, 64, 64, 4, 4))),
            (math.inf, Config(up=Tile(128, 128, 64, 8, 3), down=Tile(128, 256, 64, 8, 3), gate=Tile(128, 128, 64, 8, 3),
                              gradient=Tile(128, 256, 64, 8, 5), narrow=Tile(128, 64, 64, 4, 4))),
        ],
        "tf32": [
            (16, Config(up=Tile(16, 64, 64, 4, 3), down=Tile(16, 64, 64, 4, 4), gate=Tile(16, 64, 64, 4, 3),
                        gradient=Tile(64, 128, 16, 4, 5), narrow=Tile(16, 64, 64, 4, 4))),
            (math.inf, Config(up=Tile(64, 64, 32, 4, 4), down=Tile(64, 128, 32, 4, 4), gate=Tile(64, 64, 32, 4, 4),
                              gradient=Tile(64, 128, 32, 4, 5), narrow=Tile(64, 64, 32, 4, 4))),
        ],
    },
    "ampere": {
        "16bit": [
            (16, Config(up=Tile(16, 64, 128, 4, 3), down=Tile(16, 64, 128, 4, 4), gate=Tile(16, 64, 128, 4, 3),
                        gradient=Tile(128, 64, 16, 4, 5), narrow=Tile(16, 64, 128, 4, 4))),
            (32, Config(up=Tile(32, 64, 128, 4, 3), down=Tile(32, 64, 128, 4, 4), gate=Tile(32, 64, 128, 4, 3),
                        gradient=Tile(128, 128, 32, 8, 5), narrow=Tile(32, 64, 128, 4, 4))),
            (160, Config(up=Tile(64, 64, 64, 4, 4), down=Tile(64, 128, 64, 4, 4), gate=Tile(64, 64, 64, 4, 4),
                         gradient=Tile(128, 128, 64, 8, 5), narrow=Tile(64, 64, 64, 4, 4))),
            # with twice the columns `up` and `down` spill in the loop
            (math.inf, Config(up=Tile(128, 64, 64, 8, 3), down=Tile(128, 128, 64, 8, 3), gate=Tile(128, 128, 64, 8, 3),
                              gradient=Tile(128, 128, 64, 8, 5), narrow=Tile(128, 64, 64, 4, 4))),
        ],
        "tf32": [
            (16, Config(up=Tile(16, 64, 64, 4, 3), down=Tile(16, 64, 64, 4, 4), gate=Tile(16, 64, 64, 4, 3),
                        gradient=Tile(64, 128, 16, 4, 5), narrow=Tile(16, 64, 64, 4, 4))),
            (math.inf, Config(up=Tile(64, 64, 32, 4, 4), down=Tile(64, 128, 32, 4, 4), gate=Tile(64, 64, 32, 4, 4),
                              gradient=Tile(64, 128, 32, 4, 5), narrow=Tile(64, 64, 32, 4, 4))),
        ],
    },
    "cdna": {
        "16bit": [
            (16, Config(up=Tile(16, 64, 128, 4, 2), down=Tile(16, 64, 128, 4, 3), gate=Tile(16, 64, 128, 4, 2),
                        gradient=Tile(128, 128, 16, 8, 4), narrow=Tile(16, 64, 128, 4, 3))),
            (32, Config(up=Tile(32, 64, 128, 4, 2), down=Tile(32, 64, 128, 4, 3), gate=Tile(32, 64, 128, 4, 2),
                        gradient=Tile(128, 128, 32, 8, 4), narrow=Tile(32, 64, 128, 4, 3))),
            (160, Config(up=Tile(64, 64, 64, 4, 3), down=Tile(64, 128, 64, 4, 3), gate=Tile(64, 64, 64, 4, 3),
                         gradient=Tile(128, 128, 64, 8, 3), narrow=Tile(64, 64, 64, 4, 3))),
            (math.inf, Config(up=Tile(128, 128, 64, 8, 2), down=Tile(128, 256, 64, 8, 2), gate=Tile(128, 128, 64, 8, 2),
                              gradient=Tile(128, 128, 64, 8, 3), narrow=Tile(128, 64, 64, 4, 2))),
        ],
    },
}
# without matrix instructions, a tile has to fit the registers
_FLOAT32: Table = [
    (16, Config(up=Tile(16, 32, 32, 4, 2), down=Tile(16, 32, 32, 4, 2), gate=Tile(16, 32, 32, 4, 2),
                gradient=Tile(64, 64, 16, 4, 3), narrow=Tile(16, 32, 32, 4, 2))),
    (math.inf, Config(up=Tile(64, 32, 32, 4, 2), down=Tile(64, 64, 32, 4, 2), gate=Tile(64, 64, 32, 4, 2),
                      gradient=Tile(64, 64, 32, 4, 3), narrow=Tile(64, 32, 32, 4, 2))),
]
# widths that are not multiples of 16 are loaded number by number, which leaves no registers for larger tiles
UNALIGNED = Config(up=Tile(16, 16, 32, 4, 2), down=Tile(16, 32, 32, 4, 2), gate=Tile(16, 32, 32, 4, 2),
                   gradient=Tile(32, 32, 16, 4, 4), narrow=Tile(16, 32, 32, 4, 2))
# fmt: on
for _tables in CONFIGS.values():
    _tables["float32"] = _FLOAT32
DECODING = {family: Decoding() for family in FAMILIES}

# a list rather than a context variable: autograd calls backward in a thread of its own
_assumed: list[str] = []


@contextmanager
def assumed(family: str) -> Iterator[None]:
    """Makes the back end take the tiles of `family`, a key of `CONFIGS`, on any device."""
    _assumed.append(family)
    try:
        yield
    finally:
        _assumed.remove(family)


def serves(device: torch.device) -> bool:
    """Returns True if `CONFIGS` has tiles for a device, and for any device that is not a GPU."""
    return bool(_assumed) or device.type != "cuda" or _family_of_gpu(_number(device)) is not None


def family_of(device: torch.device) -> str:
    """Returns the key of `CONFIGS` for a device: `"hopper"` if it is not a GPU.

    Raises:
        ValueError: for a GPU that the kernels do not serve.
    """
    if _assumed or device.type != "cuda":
        return _assumed[-1] if _assumed else "hopper"
    family = _family_of_gpu(_number(device))
    if family is None:
        raise ValueError(f"The Triton kernels do not serve {device}: set experts_implementation='moe_grouped_mm'.")
    return family


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _family_of_gpu(index: int) -> str | None:
    """Returns the family of a GPU, or None if the kernels do not serve it. It warns once if Triton cannot work."""
    try:
        driver: Any = triton.runtime.driver.active
        shared = driver.utils.get_device_properties(index)["max_shared_mem"] // 1024
    except Exception as error:  # Triton builds this by a C compiler, which fails in many ways
        warnings.warn(
            f"Triton cannot reach GPU {index} ({type(error).__name__}: {error}), so torch's grouped_mm computes the "
            "experts, slower and with more memory. Triton needs a C compiler: install gcc or set CC.",
            stacklevel=2,
        )
        return None
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return "cdna" if name in ("gfx942", "gfx950") else None
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0) or shared < FAMILIES["ampere"]:
        return None
    if capability[0] == 10 and Version(triton.__version__) < Version("3.7"):
        # https://github.com/triton-lang/triton/issues/9871
        warnings.warn(
            f"Triton {triton.__version__} compiles matrix products wrongly for GPU {index} (compute capability "
            f"{capability[0]}.{capability[1]}), so torch's grouped_mm computes the experts: install triton>=3.7 with "
            "the torch that asks for it.",
            stacklevel=2,
        )
        return None
    return "hopper" if capability[0] in (9, 10) and shared >= FAMILIES["hopper"] else "ampere"


def precision_of(dtype: torch.dtype) -> str:
    """Returns how products of a dtype are computed: `"tf32"` for float32 if the user allowed it, else `"ieee"`.

    `torch.set_float32_matmul_precision("high")`, `torch.backends.cuda.matmul` and `TrainingArguments(tf32=True)` allow
    it.
    """
    allowed = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def choose_config(num_rows: int, down: Sequence[int], dtype: torch.dtype, family: str) -> Config:
    """Returns the tiles for the average number of rows per expert. The host does not know how balanced the router is.

    Args:
        num_rows: the number A of rows.
        down: (E, H, I), the shape of the second matrices.
        dtype: the dtype of the products.
        family: a key of `CONFIGS`.
    """
    num_experts, *widths = down
    if any(width % 16 for width in widths):
        return UNALIGNED
    numbers = "16bit" if dtype.itemsize == 2 else "tf32" if precision_of(dtype) == "tf32" else "float32"
    table = CONFIGS[family].get(numbers, CONFIGS[family]["float32"])
    return next(config for rows, config in table if num_rows <= rows * num_experts)
