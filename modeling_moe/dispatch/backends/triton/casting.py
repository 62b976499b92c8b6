# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Under autocast the Triton back end multiplies copies of the experts' matrices in 16 bits; the experts stay in fp32.

A copy exists during one forward or one backward, or within `cast_once` during all of them.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class _Copy(NamedTuple):
    """_Copy is a copy of one parameter's memory in another dtype.

    Attributes:
        owner: a reference to the parameter, which drops the copy when the parameter is deleted.
        memory: a reference that keeps the address, the key of the copy, from being reused.
        state: the version of the parameter when it was copied, and the dtype of the copy.
        numbers: the elements in the order of memory.
    """

    owner: weakref.ref
    memory: StorageWeakRef
    state: tuple[int, torch.dtype]
    numbers: torch.Tensor


class _Copies:
    """_Copies holds the copies of `cast_once` by address, because checkpointing and transposes make new tensors."""

    def __init__(self):
        self.copies: dict[int, _Copy] = {}

    def of(self, matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns `matrices` in `dtype`."""
        memory = matrices.untyped_storage()
        if memory.nbytes() != matrices.nbytes or matrices.storage_offset():
            return matrices.to(dtype)  # a part of a larger tensor
        key, state = memory._cdata, (matrices._version, dtype)
        copy = self.copies.get(key)
        if copy is None or copy.state != state:
            owner = matrices if matrices._base is None else matrices._base
            numbers = matrices.detach().as_strided((matrices.numel(),), (1,), 0).to(dtype)
            drop = weakref.ref(owner, lambda _: self.copies.pop(key, None))
            self.copies[key] = copy = _Copy(drop, StorageWeakRef(memory), state, numbers)
        return copy.numbers.as_strided(matrices.shape, matrices.stride())


# a list rather than a context variable: autograd calls backward in a thread of its own
_open: list[_Copies] = []


@contextmanager
def cast_once() -> Iterator[None]:
    """Casts each of the experts' matrices once for all passes within the context, under autocast on a GPU.

    Open it for one optimizer step and leave it before the optimizer steps. All micro-batches, their backward and its
    recomputation then share one copy in 16 bits of each matrix, which is dropped on leaving.

    A matrix that is changed in place is cast again. A change through `.data` is not seen: do not use it with FSDP or
    DeepSpeed ZeRO-3, which give matrices new memory in each layer. The context holds for all threads, and an inner one
    does nothing. All passes must run on one stream. A CUDA graph that is captured within makes its own copies.

    Example:
        >>> from modeling_moe.dispatch.backends.triton.casting import cast_once
        >>> with cast_once():
        ...     for batch in micro_batches:
        ...         with torch.autocast("cuda", torch.bfloat16):
        ...             loss = model(**batch).loss
        ...         loss.backward()
        >>> optimizer.step()
    """
    copies = _Copies()
    _open.append(copies)
    try:
        yield
    finally:
        _open.remove(copies)


def cast(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns `matrices` (E, N, M) in `dtype`: unchanged, as the copy that `cast_once` holds, or as a new copy."""
    if matrices.dtype == dtype:
        return matrices
    # a graph reads its copy at each replay, and an inference tensor has no version
    shared = _open and not matrices.is_inference()
    if not shared or (matrices.is_cuda and torch.cuda.is_current_stream_capturing()):
        return matrices.to(dtype)
    return _open[0].of(matrices, dtype)
