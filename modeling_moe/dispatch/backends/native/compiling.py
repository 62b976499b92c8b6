# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""experts.c as a library of this machine: compiled by gcc when it is first wanted, and kept for the next process."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers.utils import logging


logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("experts.c")
HASH_BYTES = hashlib.sha256().digest_size
# as numbers.h has them
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# traps and errno, which nobody looks at, keep loops from being vectorised; scratch changes its type from use to use
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-shared",
    "-fPIC",
]


# for the instructions of torch's CPU capability of that name
PROCESSORS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"]}
PROCESSORS["AVX512"] = [*PROCESSORS["AVX2"], *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]


def processor_flags() -> list[str]:
    """For the instructions that torch itself uses here."""
    flags = list(PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), []))
    if "-mavx512f" in flags:
        flags += ["-mprefer-vector-width=512", *(["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else [])]
    return flags


def _is_whole(library: Path) -> bool:
    """Whether a library ends with the hash of what stands before: loading a truncated one would kill the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-HASH_BYTES:] == hashlib.sha256(content[:-HASH_BYTES]).digest()


def _build(command: list[str], library: Path) -> None:
    """Runs the compiler; processes that do the same at the same time do each other no harm."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run(["gcc", *command, "-o", str(built), "-lm"], check=True, capture_output=True, text=True)
        with open(built, "ab") as stream:
            # the loader of the system reads no further than the sections, which the file's header places
            stream.write(hashlib.sha256(built.read_bytes()).digest())
        os.replace(built, library)


def compiled(dtype: torch.dtype, processor: Sequence[str]) -> Path:
    """The library for `dtype` and a processor's flags, compiled unless it is there already.

    Raises:
        OSError: where there is no gcc, or no folder to write to.
        subprocess.CalledProcessError: if gcc fails.
    """
    command = [*FLAGS, *processor, f"-DELEMENT={ELEMENTS[dtype]}", str(SOURCE)]
    version = subprocess.run(["gcc", "-dumpfullversion"], check=True, capture_output=True, text=True).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    key = hashlib.sha256("\n".join([*command[:-1], version, *sources]).encode()).hexdigest()[:16]
    library = Path(constants.HF_HOME) / "modeling_moe" / f"experts-{key}.so"
    if not _is_whole(library):
        _build(command, library)
    return library


@functools.cache
def native_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of experts.c for `dtype`, or None where they cannot be had: another dtype, another system than
    Linux, no gcc. A gcc that fails, or a folder that cannot be written to, is warned of."""
    if dtype not in ELEMENTS or platform.system() != "Linux" or shutil.which("gcc") is None:
        return None
    try:
        return ctypes.CDLL(str(compiled(dtype, processor_flags())))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        logger.warning(f"the experts run without their compiled functions, slower: {reason}")
        return None
