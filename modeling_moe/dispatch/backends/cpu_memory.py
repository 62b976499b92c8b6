# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""CPU helpers choose the dtype to multiply in, ask for huge pages and reuse memory of temporaries."""

import ctypes
import sys

import torch


# Linux: the size of a page in bytes, and the advice to use huge pages
PAGE, MADV_HUGEPAGE = 4096, 14


def math_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype to multiply in.

    It is the dtype of `x`, but fp32 for 16 bits on a CPU without instructions for them: their GEMM is emulated there,
    several times slower than casting to fp32 and back.
    """
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if x.device.type == "cpu" and x.dtype in native and not native[x.dtype]():
        return torch.float32
    return x.dtype


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks Linux to back a fresh tensor by huge pages and returns the tensor.

    With ordinary pages, page faults take a tenth of the time of a training step's products.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.nbytes >= 1 << 22:
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return tensor


class Scratch:
    """Scratch lends memory for the temporaries of one chunk, again for each chunk, so that it stays in the cache."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, rows: int):
        self.like, self.dtype, self.rows = like, dtype, rows
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Returns uninitialised memory (rows, columns) under a name."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.rows, columns, dtype=self.dtype)
        return self.buffers[name][:rows]

    def gather(self, name: str, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Copies the rows `index` of `source` in the dtype of the products."""
        if source.dtype != self.dtype:
            return source.index_select(0, index).to(self.dtype)
        return torch.index_select(source, 0, index, out=self.take(name, len(index), source.shape[1]))
