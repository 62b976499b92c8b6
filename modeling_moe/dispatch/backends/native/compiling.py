# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module compiles experts.c by gcc when a process first needs it, and keeps the library for the next process."""

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

from .structures import ELEMENTS, declare, definitions


logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("experts.c")
HASH_BYTES = hashlib.sha256().digest_size
# loops are vectorised only without traps and errno, which nothing here reads; scratch is used as several types
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

# torch's CPU capability -> options for its instructions
PROCESSORS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"]}
PROCESSORS["AVX512"] = [*PROCESSORS["AVX2"], *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]


def processor_flags() -> list[str]:
    """Returns the options for the instructions that torch uses on this machine."""
    flags = list(PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), []))
    if "-mavx512f" in flags:
        flags += ["-mprefer-vector-width=512", *(["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else [])]
    return flags


def _is_whole(library: Path) -> bool:
    """Returns True if a library ends with the hash of its content: loading a truncated one would kill the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-HASH_BYTES:] == hashlib.sha256(content[:-HASH_BYTES]).digest()


def _build(command: list[str], library: Path) -> None:
    """Runs the compiler. Several processes may build the same library at the same time."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run(["gcc", *command, "-o", str(built), "-lm"], check=True, capture_output=True, text=True)
        with open(built, "ab") as stream:
            # the system's loader does not read behind the sections that the file's header lists
            stream.write(hashlib.sha256(built.read_bytes()).digest())
        os.replace(built, library)


def compiled(dtype: torch.dtype, processor: Sequence[str]) -> Path:
    """Returns the path of the library for a dtype, and compiles it unless it exists.

    Args:
        dtype: a key of [`~modeling_moe.dispatch.backends.native.structures.ELEMENTS`].
        processor: the compiler's options for the processor.

    Raises:
        OSError: where there is no gcc, or no folder to write to.
        subprocess.CalledProcessError: if gcc fails.
    """
    command = [*FLAGS, *processor, *definitions(dtype), str(SOURCE)]
    version = subprocess.run(["gcc", "-dumpfullversion"], check=True, capture_output=True, text=True).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    key = hashlib.sha256("\n".join([*command[:-1], version, *sources]).encode()).hexdigest()[:16]
    library = Path(constants.HF_HOME) / "modeling_moe" / f"experts-{key}.so"
    if not _is_whole(library):
        _build(command, library)
    return library


@functools.cache
def native_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Returns the functions of experts.c for a dtype, or None for another dtype, on another system than Linux and
    without gcc.

    It warns and returns None if gcc fails or if the library cannot be written.

    Raises:
        RuntimeError: if the library does not agree with structures.py.
    """
    if dtype not in ELEMENTS or platform.system() != "Linux" or shutil.which("gcc") is None:
        return None
    try:
        return load(compiled(dtype, processor_flags()), dtype)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        logger.warning(f"the experts run without their compiled functions, slower: {reason}")
        return None


def load(path: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """Loads a library that `compiled` made for a dtype.

    Raises:
        RuntimeError: if the library does not agree with structures.py.
    """
    return declare(ctypes.CDLL(str(path)), dtype)
