# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `environment`: it describes the machine, and measures how fast it copies and multiplies."""

import importlib.util
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from ..roofline import peak_of
from .results import Results
from .sizes import Size
from .timing import median_ms


PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy")
# package -> what is omitted without it
WANTED = {
    "datasets": "tests that load data, and the part science",
    "dill": "datasets",
    "multiprocess": "datasets",
    "evaluate": "tests of evaluation, and the part science",
    "liger_kernel": "the comparison with Liger",
    "gguf": "the part science",
    "bitsandbytes": "experts in 4 bits",
}


def run(results: Results, size: Size) -> None:
    """Writes the versions, the GPU, missing packages, and the measured rates."""
    results.put(python=platform.python_version(), **{package: _version(package) for package in PACKAGES})
    for package, without in WANTED.items():
        if importlib.util.find_spec(package) is None:
            results.put(missing=package, left_out=without)
    with results.attempt(what="the GPU"):
        _put_gpu(results)
    with results.attempt(what="copy"):
        _put_bandwidth(results, size)
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
    ):
        with results.attempt(what=f"products in {name}"):
            _put_rate(results, size, name, dtype, precision)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _put_gpu(results: Results) -> None:
    properties = torch.cuda.get_device_properties(0)
    peak = peak_of(properties.name)
    results.put(
        gpu=properties.name,
        capability=list(torch.cuda.get_device_capability(0)),
        multiprocessors=properties.multi_processor_count,
        gpu_gib=properties.total_memory / 2**30,
        cuda=torch.version.cuda,
        stated_tflops=None if peak is None else peak.tera_flops,
        stated_tbs=None if peak is None else peak.tera_bytes,
    )
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        results.put(nvidia_smi=(done.stdout or done.stderr).strip())


def _put_bandwidth(results: Results, size: Size) -> None:
    source = torch.zeros(size.copied, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), size.rounds)
    results.put(copy_tbs=2 * size.copied / ms / 1e9)


def _put_rate(results: Results, size: Size, name: str, dtype: torch.dtype, precision: str) -> None:
    shape = (size.matrix, size.matrix)
    left, right = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ms = median_ms(lambda: left @ right, size.rounds)
    finally:
        torch.set_float32_matmul_precision(before)
    results.put(product=name, tflops=2 * size.matrix**3 / ms / 1e9)
