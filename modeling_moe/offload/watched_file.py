# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A file of weights is read while a model runs, and each read checks that the file is the one that was opened."""

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..utils.errors import UserError


class _Stamp(NamedTuple):
    """A file has another stamp after it was replaced, shortened, extended or written to."""

    device: int
    inode: int
    size: int
    modified_ns: int


def _stamp(found: os.stat_result) -> _Stamp:
    return _Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class WatchedFile:
    """A file from which byte ranges are read into memory.

    The file is read and not mapped: mapped pages would count as memory of the process, and products of a mapped tensor,
    whose address is not aligned, differ in the last bits from products of an aligned one. The file is opened for each
    read, so several threads may read at once, and a copy of the object in another process works.

    Args:
        path: the file.

    Raises:
        UserError: if the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._opened = _stamp(path.stat())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def read_into(self, offset: int, out: torch.Tensor) -> None:
        """Fills a contiguous CPU tensor with the bytes from `offset` on.

        Raises:
            UserError: if the disk gives an error, or the file changed since it was opened; `out` may then hold anything.
        """
        target = memoryview((ctypes.c_char * out.nbytes).from_address(out.data_ptr())).cast("B")
        try:
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(offset)
                done = 0
                while done < out.nbytes and (count := stream.readinto(target[done:])):
                    done += count
                # compared after the read, so that a change while the file was read is seen too
                changed = _stamp(os.fstat(stream.fileno())) != self._opened
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more ({error.strerror}): load the model again") from error
        if changed or done < out.nbytes:
            raise UserError(f"{self.path} changed while the model was using it: load the model again")
