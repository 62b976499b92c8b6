# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives back the memory of a file's pages once a tensor that lies in them is no longer needed.

safetensors maps a file into memory, so that each page that was read counts as memory of the process until the file is closed.
The kernel would take such pages back when memory is short, and measures and limits of a process count them nevertheless.
"""

import ctypes
import mmap
import sys
from array import array
from pathlib import Path

import torch


MAPS, PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
# bits of an entry of pagemap (the kernel's admin-guide/mm/pagemap.rst): in memory, swapped out, a page of the file itself
PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61


def release(tensor: torch.Tensor) -> None:
    """Drops the whole pages of a file in which `tensor` lies; reading them again reads the file again.

    Nothing happens to a tensor outside a mapped file, to one that somebody has written to, and on systems other than Linux.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.is_contiguous() and start < end and _in_a_file(start, end) and not _written(start, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _in_a_file(start: int, end: int) -> bool:
    """Returns whether the addresses lie in one private mapping of a file."""
    for line in MAPS.read_text().splitlines():
        addresses, permissions, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and end <= last:
            return inode != "0" and permissions.endswith("p")
    return False


def _written(start: int, end: int) -> bool:
    """Returns whether a page between the addresses is a changed copy of the file's page, or the kernel does not tell."""
    pages = (end - start) // mmap.PAGESIZE
    try:
        with PAGES.open("rb") as file:
            file.seek(start // mmap.PAGESIZE * 8)
            entries = array("Q", file.read(pages * 8))
    except (OSError, ValueError):
        return True  # some sandboxes have no such file
    return len(entries) < pages or any(entry & (PRESENT | SWAPPED) and not entry & OF_FILE for entry in entries)
