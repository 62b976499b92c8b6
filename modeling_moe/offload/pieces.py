# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A piece is a tensor that lies somewhere in files, cut up and rearranged; any part of a piece can be read alone.

A parameter of fused experts (E, ...) is often stored otherwise: in one tensor per expert and matrix, transposed, or with
rows in another order. A tree of pieces says where each element lies, and reading one expert reads only the bytes of this
expert. Reading copies bytes and casts them, and computes nothing else.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from ..checkpoints.lazy_tensor import Index
from .watched_file import WatchedFile


@dataclass(frozen=True)
class Piece(ABC):
    """A tensor that can be read in parts.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Copies a part of the tensor.

        Args:
            index: one slice with start, stop and step 1 for each dimension.
            out: memory of the shape of the part, of any dtype and layout; nothing is read for a meta tensor, which only
                checks that the part can be read.

        Raises:
            UserError: if the file cannot be read or changed since it was opened.
            ValueError: if the tensor holds what is no copy of the file's elements.
        """

    def full(self) -> Index:
        """Returns the index of the whole tensor."""
        return tuple(slice(0, size) for size in self.shape)


class _Run(NamedTuple):
    """The shortest run of consecutive elements that holds a part of a tensor.

    Attributes:
        start: number of elements before the run.
        shape: shape of the run, whose first dimension is the one that the part cuts first.
        inner: what the part takes of the run.
    """

    start: int
    shape: tuple[int, ...]
    inner: Index

    @property
    def whole(self) -> bool:
        """Whether the part takes all of the run."""
        return all(part == slice(0, size) for part, size in zip(self.inner, self.shape, strict=True))


def _run(shape: tuple[int, ...], index: Index) -> _Run:
    """Returns the run of a part in a contiguous tensor."""
    shape, index = shape or (1,), index or (slice(0, 1),)
    # the dimensions before `axis` are cut to one element each
    axis = next((d for d, part in enumerate(index) if part.stop - part.start != 1), len(shape) - 1)
    start = sum(part.start * math.prod(shape[d + 1 :]) for d, part in enumerate(index[: axis + 1]))
    count = index[axis].stop - index[axis].start
    return _Run(start, (count, *shape[axis + 1 :]), (slice(0, count), *index[axis + 1 :]))


@dataclass(frozen=True)
class Stored(Piece):
    """A tensor whose elements lie one after another in a file, from byte `offset` on."""

    file: WatchedFile
    offset: int

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Reads a part straight into `out` where `out` has the layout and the dtype of the file."""
        if out.is_meta or not out.numel():
            return
        run = _run(self.shape, index)
        offset = self.offset + run.start * self.dtype.itemsize
        if run.whole and out.is_contiguous() and out.dtype == self.dtype and out.device.type == "cpu":
            self.file.read_into(offset, out)
            return
        buffer = torch.empty(run.shape, dtype=self.dtype, device="cpu")
        self.file.read_into(offset, buffer)
        out.copy_(buffer[run.inner].reshape(out.shape))


@dataclass(frozen=True)
class Cat(Piece):
    """The concatenation of pieces along dimension `dim`."""

    pieces: tuple[Piece, ...]
    dim: int

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Reads from each piece that the part touches."""
        wanted = index[self.dim]
        place = bisect_right(self._starts, wanted.start) - 1
        while place < len(self.pieces) and self._starts[place] < wanted.stop:
            piece, first = self.pieces[place], self._starts[place]
            start, stop = max(wanted.start, first), min(wanted.stop, first + piece.shape[self.dim])
            inner = (*index[: self.dim], slice(start - first, stop - first), *index[self.dim + 1 :])
            piece.read_into(inner, out.narrow(self.dim, start - wanted.start, stop - start))
            place += 1

    @cached_property
    def _starts(self) -> list[int]:
        """The index of dimension `dim` at which each piece begins."""
        return list(accumulate((piece.shape[self.dim] for piece in self.pieces[:-1]), initial=0))


@dataclass(frozen=True)
class Cut(Piece):
    """A piece from index `start` of dimension `dim` on."""

    piece: Piece
    dim: int
    start: int

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Reads the part from the uncut piece."""
        part = index[self.dim]
        moved = slice(part.start + self.start, part.stop + self.start)
        self.piece.read_into((*index[: self.dim], moved, *index[self.dim + 1 :]), out)


@dataclass(frozen=True)
class Permuted(Piece):
    """A piece whose dimension `dims[d]` became dimension d."""

    piece: Piece
    dims: tuple[int, ...]

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Reads the part into a permuted view of `out`."""
        back = [self.dims.index(d) for d in range(len(self.dims))]
        self.piece.read_into(tuple(index[d] for d in back), out.permute(back))


@dataclass(frozen=True)
class Reshaped(Piece):
    """The elements of a piece, in their order, in another shape."""

    piece: Piece

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Reads the rows of the piece that hold the part."""
        if not out.numel():
            return
        run, source = _run(self.shape, index), self.piece.shape or (1,)
        # rows along the first dimension of the piece that has more than one element
        axis = next((d for d, size in enumerate(source) if size > 1), len(source) - 1)
        width, count = math.prod(source[axis + 1 :]), math.prod(run.shape)
        first, last = run.start // width, -(-(run.start + count) // width)
        rows = (*(slice(0, 1) for _ in range(axis)), slice(first, last), *self.piece.full()[axis + 1 :])
        shape = (*source[:axis], last - first, *source[axis + 1 :])
        inner, shape = rows[: len(self.piece.shape)], shape[: len(self.piece.shape)]
        if run.whole and (last - first) * width == count and out.is_contiguous():
            self.piece.read_into(inner, out.view(shape))
            return
        buffer = torch.empty(shape, dtype=out.dtype, device="meta" if out.is_meta else "cpu")
        self.piece.read_into(inner, buffer)
        skipped = run.start - first * width
        out.copy_(buffer.view(-1)[skipped : skipped + count].view(run.shape)[run.inner].reshape(out.shape))


@dataclass(frozen=True)
class Cast(Piece):
    """A piece in another dtype."""

    piece: Piece

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Reads the part, rounded to this dtype first if `out` has a third one."""
        if out.dtype == self.dtype:
            self.piece.read_into(index, out)
            return
        rounded = torch.empty(out.shape, dtype=self.dtype, device="meta" if out.is_meta else "cpu")
        self.piece.read_into(index, rounded)
        out.copy_(rounded)


@dataclass(frozen=True)
class Computed(Piece):
    """A tensor that an operation computes, and which is therefore refused when it is read."""

    operation: str

    def read_into(self, index: Index, out: torch.Tensor) -> None:
        """Raises a ValueError that names the operation."""
        raise ValueError(f"transformers computes it with {self.operation} when it loads the checkpoint")


def stored(piece: Piece) -> Iterator[Stored]:
    """Yields the tensors in files of which a piece is made."""
    if isinstance(piece, Stored):
        yield piece
    elif isinstance(piece, Cat):
        for part in piece.pieces:
            yield from stored(part)
    elif isinstance(piece, (Cut, Permuted, Reshaped, Cast)):
        yield from stored(piece.piece)


def stack(pieces: Sequence[Piece], dim: int) -> Piece:
    """Returns pieces of one shape stacked along a new dimension `dim`, which is not negative."""
    shape, dtype = pieces[0].shape, pieces[0].dtype
    single = (*shape[:dim], 1, *shape[dim:])
    lifted = tuple(Reshaped(single, dtype, piece) for piece in pieces)
    return Cat((*shape[:dim], len(pieces), *shape[dim:]), dtype, lifted, dim)
