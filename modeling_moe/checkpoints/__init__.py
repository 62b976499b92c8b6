# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints are read and written here tensor by tensor, so memory does not grow with the model."""

from .damage import UnusableError
from .fingerprint import check_hashes, fingerprint
from .lazy_tensor import LazyTensor, State
from .safetensors_format import read_tensors
from .sources import Source, open_source, refuse_quantised
from .writer import refuse_full_disk, write_checkpoint


__all__ = [
    "LazyTensor",
    "Source",
    "State",
    "UnusableError",
    "check_hashes",
    "fingerprint",
    "open_source",
    "read_tensors",
    "refuse_full_disk",
    "refuse_quantised",
    "write_checkpoint",
]
