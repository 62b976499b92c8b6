# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A lazy tensor has a known shape and dtype and is read only when it is written; conversions transform lazy tensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch


Index = tuple[slice, ...]


class Place(NamedTuple):
    """A place in a file at which the elements of a tensor lie one after another.

    Attributes:
        file: the file.
        offset: byte at which the tensor begins.
    """

    file: Path
    offset: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        load: function that reads `tensor[index]`; it is called each time the part is needed.
        parts: pieces whose concatenation or stack along dimension 0 is the tensor; a writer that goes through them
            never holds the whole tensor. Empty if the tensor is read whole.
        place: where the tensor lies if the tensor is one of a file, else None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[Index], torch.Tensor]
    parts: Sequence["LazyTensor"] = field(default=(), repr=False)
    place: Place | None = field(default=None, repr=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """Wraps a tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda index: tensor[index])

    @classmethod
    def combine(
        cls,
        function: Callable[..., torch.Tensor],
        *tensors: "LazyTensor",
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LazyTensor":
        """Returns `function(*tensors)`; the function is computed whole each time a part of the result is read.

        Args:
            function: maps the read tensors to the result.
            *tensors: arguments of the function.
            shape: shape of the result; the first argument's shape if not given.
            dtype: dtype to which the result is cast; the first argument's dtype if not given.
        """
        shape = tensors[0].shape if shape is None else tuple(shape)
        dtype = dtype or tensors[0].dtype
        return cls(shape, dtype, lambda index: function(*(t.read() for t in tensors)).to(dtype)[index])

    @classmethod
    def cat(cls, tensors: Sequence["LazyTensor"]) -> "LazyTensor":
        """Concatenates tensors along dimension 0."""
        shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
        return cls(
            shape, tensors[0].dtype, lambda index: torch.cat([t.read() for t in tensors])[index], tuple(tensors)
        )

    @classmethod
    def stack(cls, tensors: Sequence["LazyTensor"]) -> "LazyTensor":
        """Stacks tensors along a new dimension 0."""
        shape = (len(tensors), *tensors[0].shape)
        return cls(
            shape, tensors[0].dtype, lambda index: torch.stack([t.read() for t in tensors])[index], tuple(tensors)
        )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return self.numel * self.dtype.itemsize

    def __getitem__(self, index: slice | int | tuple[slice | int, ...]) -> "LazyTensor":
        """Returns the part `tensor[index]` of slices with step 1 and integers; a tensor in a file reads only this part."""
        index = index if isinstance(index, tuple) else (index,)
        ranges, kept = [], []
        for size, part in zip(self.shape, index + (slice(None),) * (len(self.shape) - len(index)), strict=True):
            kept.append(isinstance(part, slice))
            start, stop, _ = part.indices(size) if isinstance(part, slice) else (part, part + 1, 1)
            ranges.append(slice(start, stop))
        inner = [part.stop - part.start for part in ranges]
        shape = tuple(size for size, keep in zip(inner, kept, strict=True) if keep)

        def load(outer: Index) -> torch.Tensor:
            return self.load(tuple(ranges)).reshape(shape)[outer]

        return LazyTensor(shape, self.dtype, load)

    def map(
        self, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None
    ) -> "LazyTensor":
        """Returns `function(tensor)` in the tensor's dtype; `shape` is needed if the function changes the shape."""
        return LazyTensor.combine(function, self, shape=shape)

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """Returns the tensor cast to `dtype`."""
        if dtype == self.dtype:
            return self
        return LazyTensor(
            self.shape, dtype, lambda index: self.load(index).to(dtype), tuple(part.to(dtype) for part in self.parts)
        )

    def transpose(self) -> "LazyTensor":
        """Returns the transpose of a matrix."""
        return self.map(lambda tensor: tensor.T, shape=self.shape[::-1])

    def read(self) -> torch.Tensor:
        """Reads the whole tensor."""
        return self.load((slice(None),) * len(self.shape))

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yields consecutive pieces that together hold all elements, in order."""
        if not self.parts:
            yield self.read()
        for part in self.parts:
            yield from part.chunks()


State = dict[str, LazyTensor]
"""A checkpoint as a dictionary of tensor names to tensors."""
