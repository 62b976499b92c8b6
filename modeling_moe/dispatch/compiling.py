# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""native.c as a library of this machine: compiled by gcc when it is first wanted, and kept for the next process."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers.utils import logging


logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("native.c")
# as native.c numbers them
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# no trap, no errno: neither can be seen here, and both keep loops from being vectorised
FLAGS = "-std=gnu11 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()


def _processor_flags() -> list[str]:
    """What torch's own kernels would use."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() != "x86_64" or capability == "DEFAULT":
        return []
    if capability != "AVX512":
        return ["-march=x86-64-v3"]
    bf16 = ["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else []
    return ["-march=x86-64-v4", "-mprefer-vector-width=512", *bf16]


def _build(compiler: str, command: list[str], library: Path) -> None:
    """Runs the compiler; a process that does the same at the same time does no harm."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run([compiler, *command, "-o", str(built), "-lm"], check=True, capture_output=True, text=True)
        os.replace(built, library)


@functools.cache
def native_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of native.c for `dtype`, or None where they cannot be had: another dtype, another system than
    Linux, no gcc. A gcc that fails is warned of once."""
    compiler = shutil.which("gcc")
    if dtype not in ELEMENTS or platform.system() != "Linux" or compiler is None:
        return None
    command = [*FLAGS, *_processor_flags(), f"-DELEMENT={ELEMENTS[dtype]}", str(SOURCE)]
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\n".join([*command[:-1], version, SOURCE.read_text()]).encode()).hexdigest()[:16]
    library = Path(constants.HF_HOME) / "modeling_moe" / f"native-{key}.so"
    try:
        if not library.exists():
            _build(compiler, command, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        logger.warning(f"the experts run without their compiled functions, slower: {reason}")
        return None
