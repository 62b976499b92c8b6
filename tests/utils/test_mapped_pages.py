"""Pages of a mapped file are given back after use, and nothing else is touched."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_moe.utils.mapped_pages import release


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident(tensor: torch.Tensor) -> int:
    """Returns the bytes in memory of the mapping in which a tensor lies."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            found = first <= tensor.data_ptr() < last
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such address")


def test_a_mapped_tensor_is_given_back_and_read_again(tmp_path):
    numbers = torch.arange(1 << 20, dtype=torch.float32)
    save_file({"first": numbers, "second": numbers * 2}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        first, second = file.get_slice("first")[...], file.get_slice("second")[...]
        assert first.equal(numbers)
        assert second.equal(numbers * 2)
        before = resident(first)
        release(first)
        assert before - resident(first) > 0.9 * first.nbytes
        assert first.equal(numbers)
        assert second.equal(numbers * 2)
        # a changed page would come back unchanged, so the tensor keeps its pages
        second[70000] = -1
        release(second)
        assert second[70000] == -1


def test_other_tensors_are_left_alone():
    """Memory of the process has no file to be read from again, so that a tensor there must keep its numbers."""
    for size in (3, 1 << 20):
        numbers = torch.ones(size)
        release(numbers)
        release(numbers[:2])
        assert numbers.sum() == size
    release(torch.ones(2, device="meta"))
