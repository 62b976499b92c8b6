# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module compiles launches for GPUs that need not be present, and reports faults of the code."""

import multiprocessing
import re
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from modeling_moe.dispatch.backends.triton.launching import Launch

from .calls import Call
from .machine_code import AMD, NVIDIA, scalar_products, spills_in_loops
from .recording import changed, record


class Target(NamedTuple):
    """Describes a GPU that Triton compiles for.

    Attributes:
        backend: Triton's name of the maker, `"cuda"` or `"hip"`.
        arch: compute capability times ten, or AMD's name.
        warp: number of threads of a warp.
        shared: shared memory that one program may have, in KiB.
        family: key of [`~modeling_moe.dispatch.backends.triton.tiles.CONFIGS`].
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    family: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163, "ampere"),
    "sm_86": Target("cuda", 86, 32, 99, "ampere"),
    "sm_89": Target("cuda", 89, 32, 99, "ampere"),
    "sm_90": Target("cuda", 90, 32, 227, "hopper"),
    "sm_100": Target("cuda", 100, 32, 227, "hopper"),
    "sm_120": Target("cuda", 120, 32, 99, "ampere"),
    "gfx942": Target("hip", "gfx942", 64, 64, "cdna"),
}
USUAL_TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
# number of columns of the memory in which sm_100's tensor cores accumulate
TENSOR_MEMORY = 512
# a product of at least so many rows must have matrix instructions
MATRIX_ROWS = 64


class _StandIn:
    """Replaces Triton's driver of a GPU that need not be present.

    The device is named after the target instead of numbered, so that Triton uses no real GPU for it.
    """

    def __init__(self, target: str):
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        target = TARGETS[self.target]
        return GPUTarget(target.backend, target.arch, target.warp)


@contextmanager
def _standing_in(target: str) -> Iterator[None]:
    # the property `active` would start CUDA; the attribute does not
    before = driver._active
    # pyrefly: ignore[bad-argument-type]: compiling calls only these three of a driver's methods
    driver.set_active(_StandIn(target))
    try:
        yield
    finally:
        driver._active = before


def distinct(launches: Iterable[Launch], target: str) -> dict[str, Launch]:
    """Returns the launches that Triton compiles separately for a target, by the properties that distinguish them."""
    different: dict[str, Launch] = {}
    with _standing_in(target):
        for launch in launches:
            binder = launch.kernel.device_caches[target][-1]
            _, specialization, options = binder(**launch.arguments, **launch.options)
            different.setdefault(f"{launch.name} {specialization} {options}", launch)
    return different


@dataclass
class Code:
    """Describes the compiled code of a launch.

    Attributes:
        target: key of `TARGETS`.
        kernel: name of the kernel.
        tile: BLOCK_M x BLOCK_N x BLOCK_K, warps and stages, as far as the kernel has them.
        uses: the calls that launch it.
        error: error of the compiler, or `""`.
        seconds: time of compiling.
        registers: number of registers of a thread.
        spills: number of loads and stores of spilled registers.
        loop_spills: number of those in the loop over the products, or in any loop of a kernel without products.
        shared: shared memory in bytes.
        tensor_memory: tensor memory in columns.
        instructions: kinds of matrix instructions; `"fma"` stands for products without them.
        scalar: shapes (rows, columns) of sums of products that could have matrix instructions, but do not.
        lines: number of machine instructions.
    """

    target: str
    kernel: str
    tile: str
    uses: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0
    registers: int = 0
    spills: int = 0
    loop_spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    instructions: list[str] = field(default_factory=list)
    scalar: list[tuple[int, int]] = field(default_factory=list)
    lines: int = 0


def faults(code: Code) -> list[str]:
    """Returns one sentence for each rule that the code breaks."""
    subject, limit = f"{code.target}: {code.kernel} {code.tile}", TARGETS[code.target].shared
    if code.error:
        return [f"{subject} does not compile: {code.error}"]
    found = []
    if code.shared > limit * 1024:
        found.append(f"{subject} takes {code.shared / 1024:g} KiB of shared memory of {limit}")
    if code.tensor_memory > TENSOR_MEMORY:
        found.append(f"{subject} takes {code.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
    if code.loop_spills:
        found.append(f"{subject} spills in its loop: {code.loop_spills} loads and stores")
    for rows, columns in code.scalar:
        if rows >= MATRIX_ROWS:
            found.append(f"{subject} multiplies into {rows}x{columns} without matrix instructions")
    return found


def tile_of(launch: Launch) -> str:
    """Returns BLOCK_M x BLOCK_N x BLOCK_K, warps, stages and register limit of a launch, as far as it has them."""
    options = launch.options
    block = "x".join(str(options[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in options)
    letters = {"num_warps": "w", "num_stages": "s", "maxnreg": "r"}
    scheduled = [f"{letter}{options[name]}" for name, letter in letters.items() if name in options]
    return " ".join([block, *scheduled]).strip()


def compile_launch(launch: Launch, target: str, analysed: bool = True) -> Code:
    """Compiles a launch for `target` without a GPU; the machine code is analysed only if `analysed` is set."""
    code, start = Code(target, launch.name, tile_of(launch)), time.perf_counter()
    try:
        kernel = launch.kernel.warmup(**launch.arguments, grid=(1,), **launch.options)
    except Exception as error:  # a compiler fails in many ways, and each is this launch's fault to report
        return replace(code, error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    code.seconds = time.perf_counter() - start
    code.shared, code.tensor_memory = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
    if analysed:
        _analyse(kernel, code)
    return code


# processes inherit the launches by fork, because kernels cannot be pickled
_forked: list[Launch] = []


def _compile_number(number: int, target: str, analysed: bool) -> Code:
    with _standing_in(target):
        return compile_launch(_forked[number], target, analysed)


def compile_all(launches: Sequence[Launch], target: str, jobs: int = 1, analysed: bool = True) -> Iterator[Code]:
    """Compiles launches in `jobs` processes, which never use a GPU, and yields their code in order.

    Args:
        launches: launches from [`record`], or from [`collect`], which returns each only once.
        target: key of `TARGETS`.
        jobs: number of processes.
        analysed: whether the machine code is analysed; otherwise only `error`, `seconds`, `shared` and
            `tensor_memory` of the codes are set.

    If a compiler crashes, the launch has an error and the run continues.
    """
    _forked[:] = launches
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(_compile_number, number, target, analysed) for number in range(len(launches))]
        for number, future in enumerate(futures):
            yield _result(future) or _compile_alone(launches[number], target, analysed)


def _result(future: Future) -> Code | None:
    """Returns the code that a process compiled; None if the process crashed, which another launch may have caused."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def _compile_alone(launch: Launch, target: str, analysed: bool) -> Code:
    _forked[:] = [launch]
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        code = _result(pool.submit(_compile_number, 0, target, analysed))
    return code or Code(target, launch.name, tile_of(launch), error="the compiler crashed")


def precompile(launches: Iterable[Launch], target: str, jobs: int = 1) -> list[Code]:
    """Fills Triton's cache with the kernels of `launches` for a target, in `jobs` processes, without using a GPU.

    Returns:
        The code of each different launch; [`faults`] names the problems of each.
    """
    return [*compile_all([*distinct(launches, target).values()], target, jobs, analysed=False)]


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _analyse(kernel: Any, code: Code) -> None:
    """Sets the fields of a code that are read from the machine code."""
    scalar, code.scalar = scalar_products(kernel.asm["ttgir"])
    if "cubin" in kernel.asm:
        isa, ptx = NVIDIA, kernel.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            usage, text = (
                _tool("cuobjdump", "--dump-resource-usage", file.name),
                _tool("nvdisasm", "-c", "-ndf", file.name),
            )
        registers = re.search(r"REG:(\d+)", usage)
        found = re.findall(r"(wgmma)\.mma_async\S*\.(m\d+n\d+k\d+)|(mma\.sync)\S*\.(m\d+n\d+k\d+)", ptx)
        found += re.findall(r"(tcgen05)\.mma\S*\.kind::(\w+)", ptx)
    else:
        isa, text = AMD, kernel.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        found = re.findall(r"v_(mfma)_\w+?_(\d+x\d+x\d+)", text)
    if registers is None:
        raise ValueError(f"{code.target}: the disassembly of {code.kernel} does not state its number of registers")
    code.registers = int(registers[1])
    code.instructions = sorted({" ".join(filter(None, each)) for each in found} | ({"fma"} if scalar else set()))
    instructions = re.findall("(?m)^" + isa.instruction, text)
    code.lines, code.spills = len(instructions), sum(bool(re.match(isa.spill, each)) for each in instructions)
    products = isa.matrix if found else isa.scalar if scalar else None
    code.loop_spills = spills_in_loops(text, isa, products) if code.spills else 0


def collect(
    calls: Iterable[Call], target: str, changes: dict[str, Any] | None = None
) -> tuple[list[Launch], list[list[str]]]:
    """Returns the different launches of calls for a target, and for each launch the calls that use it.

    Args:
        calls: the calls.
        target: key of `TARGETS`.
        changes: values of fields of [`~modeling_moe.dispatch.backends.triton.tiles.Config`] that replace those of the
            table.
    """
    family = TARGETS[target].family
    found: dict[str, Launch] = {}
    uses: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        for key, launch in distinct(record(call, family, changed(call, family, changes or {})), target).items():
            found.setdefault(key, launch)
            uses[key].append(str(call))
    return [*found.values()], [uses[key] for key in found]
