# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module describes the machine and the software versions that measurements depend on."""

import os
import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from .contestants import pin_liger
from .roofline import peak_of


def machine_facts(device: str) -> dict[str, Any]:
    """Returns processor, threads and versions by name, and on `"cuda"` the GPU with its stated peak."""
    facts: dict[str, Any] = {"device": device, "cpu": _cpu_model(), "cores": os.cpu_count()}
    facts["threads"] = torch.get_num_threads()
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    # torch.__version__ names the CUDA version that torch was built for
    facts["torch"] = torch.__version__
    facts |= {package: installed.get(package, "not installed") for package in ("transformers", "triton", "peft")}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        peak = peak_of(facts["gpu"])
        if peak is not None:
            facts["stated_peak"] = f"{peak.tera_flops:g} TFLOP/s, {peak.tera_bytes:g} TB/s"
        for name in ("liger_kernel", "liger-kernel"):
            if name in installed:
                facts["liger_kernel"] = f"{installed[name]} with {pin_liger()}"
    return facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
