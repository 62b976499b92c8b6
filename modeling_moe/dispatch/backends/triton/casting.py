# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Autocast for the Triton back end: experts stay in fp32, and the matrices that are multiplied are copies in 16 bits.

A copy lives for one forward or one backward, or within `cast_once` for all of them.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class _Copy(NamedTuple):
    """One parameter's memory in another dtype.

    Attributes:
        owner: drops this copy when the parameter is gone.
        memory: keeps the memory's address, by which it is known, from being given to another.
        state: the parameter's version when it was copied, and the copy's dtype.
        numbers: all that the memory holds, in its order.
    """

    owner: weakref.ref
    memory: StorageWeakRef
    state: tuple[int, torch.dtype]
    numbers: torch.Tensor


class _Copies:
    """The copies of an open `cast_once`, by memory: checkpointing and a transpose make other tensors of a parameter."""

    def __init__(self):
        self.copies: dict[int, _Copy] = {}

    def of(self, matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`matrices` in `dtype`."""
        memory = matrices.untyped_storage()
        if memory.nbytes() != matrices.nbytes or matrices.storage_offset():
            return matrices.to(dtype)  # they are a part of something larger
        key, state = memory._cdata, (matrices._version, dtype)
        copy = self.copies.get(key)
        if copy is None or copy.state != state:
            owner = matrices if matrices._base is None else matrices._base
            numbers = matrices.detach().as_strided((matrices.numel(),), (1,), 0).to(dtype)
            drop = weakref.ref(owner, lambda _: self.copies.pop(key, None))
            self.copies[key] = copy = _Copy(drop, StorageWeakRef(memory), state, numbers)
        return copy.numbers.as_strided(matrices.shape, matrices.stride())


# a list and no context variable: autograd calls backward from a thread of its own
_open: list[_Copies] = []


@contextmanager
def cast_once() -> Iterator[None]:
    """Casts each of the experts' matrices once for all that is computed within, under autocast on a GPU.

    Open it for one optimizer step: its micro-batches, their backward and the recomputation in it then share one copy in
    16 bits of each matrix, half as large as the matrix, which is dropped on leaving. Leave it before the optimizer
    steps. A matrix that is changed in place is cast again, but a change through `.data` is not seen: FSDP and DeepSpeed
    ZeRO-3, which give matrices new memory in each layer, have no use for it. It holds for all threads, and within
    another one it does nothing. All within must run on one stream. A CUDA graph that is captured within casts for itself.

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
    """`matrices` (E, N, M) in `dtype`: themselves, the copy that an open `cast_once` has of them, or a new one."""
    if matrices.dtype == dtype:
        return matrices
    # what a graph reads has to be there at each replay, and an inference tensor does not tell that it was changed
    shared = _open and not matrices.is_inference()
    if not shared or (matrices.is_cuda and torch.cuda.is_current_stream_capturing()):
        return matrices.to(dtype)
    return _open[0].of(matrices, dtype)
