# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A tensor that is known by shape and dtype and read only when it is written: what conversions are made of."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch


Index = tuple[slice, ...]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        load: reads the part `tensor[index]`; called each time that the part is needed.
        parts: where the tensor is a stack or concatenation along dimension 0, what it is made of, so that a writer
            need not hold it whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[Index], torch.Tensor]
    parts: Sequence["LazyTensor"] = field(default=(), repr=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """A tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda index: tensor[index])

    @classmethod
    def combine(
        cls,
        function: Callable[..., torch.Tensor],
        *tensors: "LazyTensor",
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LazyTensor":
        """`function(*tensors)`, computed whole whenever a part of it is read.

        Args:
            function: of the tensors, read.
            *tensors: its arguments.
            shape: of the result; the first argument's if not given.
            dtype: of the result, which is cast to it; the first argument's if not given.
        """
        shape = tensors[0].shape if shape is None else tuple(shape)
        dtype = dtype or tensors[0].dtype
        return cls(shape, dtype, lambda index: function(*(t.read() for t in tensors)).to(dtype)[index])

    @classmethod
    def cat(cls, tensors: Sequence["LazyTensor"]) -> "LazyTensor":
        """The tensors one after another along dimension 0."""
        shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
        return cls(
            shape, tensors[0].dtype, lambda index: torch.cat([t.read() for t in tensors])[index], tuple(tensors)
        )

    @classmethod
    def stack(cls, tensors: Sequence["LazyTensor"]) -> "LazyTensor":
        """The tensors one after another along a new dimension 0."""
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
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize

    def __getitem__(self, index: slice | int | tuple[slice | int, ...]) -> "LazyTensor":
        """The part `tensor[index]`, of slices with step 1 and integers; of a tensor in a file only it is read."""
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
        """`function(tensor)`, in the same dtype; `shape` where it changes."""
        return LazyTensor.combine(function, self, shape=shape)

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The tensor in another dtype."""
        if dtype == self.dtype:
            return self
        return LazyTensor(
            self.shape, dtype, lambda index: self.load(index).to(dtype), tuple(part.to(dtype) for part in self.parts)
        )

    def transpose(self) -> "LazyTensor":
        """A matrix, transposed."""
        return self.map(lambda tensor: tensor.T, shape=self.shape[::-1])

    def read(self) -> torch.Tensor:
        """The tensor."""
        return self.load((slice(None),) * len(self.shape))

    def chunks(self) -> Iterator[torch.Tensor]:
        """Consecutive pieces of the tensor's elements, in order."""
        if not self.parts:
            yield self.read()
        for part in self.parts:
            yield from part.chunks()


State = dict[str, LazyTensor]
"""A checkpoint: names to tensors."""
