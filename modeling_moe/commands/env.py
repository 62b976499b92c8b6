# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command prints versions, devices and back ends, and why a back end is not available, for a bug report.

    moe env
    moe env --json

Paste the output into the report. The first run compiles the back end native, which takes seconds.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table

from ..compatibility import __version__
from ..dispatch.backends import BACKENDS
from ..utils.command_line import parse
from ..utils.versions import untested


PACKAGES = (
    *(
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "safetensors",
        "huggingface_hub",
        "tokenizers",
        "numpy",
    ),
    *("triton", "bitsandbytes", "trl", "deepspeed", "matplotlib", "gguf"),
)


@dataclass
class EnvArguments:
    """How to print."""

    json: bool = field(default=False, metadata={"help": "print JSON in place of the table"})


class Environment(TypedDict):
    """What a bug report needs; each value is text for a reader, except the two mappings.

    Attributes:
        versions: release by package; packages that are not installed are left out.
        untested: packages whose release lies outside the bounds of pyproject.toml.
        system: operating system, and Python with the path of the interpreter.
        cpu: name, instructions that torch uses, cores and threads.
        devices: accelerators that torch sees.
        compiler: gcc, which the back end `native` is compiled by.
        backends: for each back end and device None if the back end runs there, or the reason why it does not.
    """

    versions: dict[str, str]
    untested: list[str]
    system: str
    cpu: str
    devices: list[str]
    compiler: str
    backends: dict[str, dict[str, str | None]]


def _versions() -> dict[str, str]:
    installed = {distribution.name.lower().replace("-", "_"): distribution.version for distribution in distributions()}
    # torch's own version names the CUDA that it was built for
    own = {"modeling_moe": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {name: installed[name] for name in PACKAGES if name in installed}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    instructions = [torch.backends.cpu.get_cpu_capability()]
    # torch 2.11 to 2.15 has these functions for private use alone
    for feature, function in {"AVX512_BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}.items():
        if hasattr(torch.cpu, function) and getattr(torch.cpu, function)():
            instructions.append(feature)
    return f"{name}; {', '.join(instructions)}; {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _devices() -> list[str]:
    found = []
    for index in range(_gpus()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        found.append(
            f"cuda:{index}: {properties.name}, {size:.1f} GiB, compute capability {properties.major}.{properties.minor}"
        )
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _compiler() -> str:
    path = shutil.which("gcc")
    if path is None:
        return "no gcc on PATH"
    release = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    return f"gcc {release or 'of unknown release'} at {path}"


def backend_reasons() -> dict[str, dict[str, str | None]]:
    """Returns, by back end of the experts and by device, None if the back end computes fp32 there, or why it does not."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(_gpus()))]
    reasons: dict[str, dict[str, str | None]] = {
        name: {device: backend.reason_unavailable(torch.device(device), torch.float32) for device in devices}
        for name, backend in BACKENDS.items()
    }
    if "triton" not in reasons:
        reasons["triton"] = dict.fromkeys(devices, "the package triton is not installed, or cannot be imported")
    return reasons


def environment() -> Environment:
    """Collects what a bug report needs; it compiles the back end `native` if that was not done before."""
    return Environment(
        versions=_versions(),
        untested=untested(),
        system=f"{platform.platform()}; Python {platform.python_version()}",
        cpu=_cpu(),
        devices=_devices(),
        compiler=_compiler(),
        backends=backend_reasons(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the environment as a table or as JSON."""
    (args,) = parse([EnvArguments], __doc__, argv)
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    table = Table("", "modeling_moe")
    rows = [
        *found["versions"].items(),
        ("untested releases", ", ".join(found["untested"]) or "none"),
        *((name, str(found[name])) for name in ("system", "cpu", "compiler")),
        ("devices", "\n".join(found["devices"]) or "no accelerator"),
        *(
            (f"back end {name}", "\n".join(f"{device}: {reason or 'available'}" for device, reason in reasons.items()))
            for name, reasons in found["backends"].items()
        ),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)
