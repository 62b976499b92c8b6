"""Any part of a tensor that was stacked, joined, cut, transposed and reshaped from tensors in a file is read alone."""

import random

import pytest
import torch
from safetensors.torch import save_file

from modeling_moe.checkpoints import open_source
from modeling_moe.offload.pieces import stored
from modeling_moe.offload.tracing import TracedTensor, traced_state


# what transformers' conversions do, from tensors a (4, 6, 10), b (4, 6, 10), c (24, 10) and d (10,)
MOVES = {
    "stack": lambda a, b, c, d: torch.stack([a[1], b[2], c[:6]]),
    "stack at the end": lambda a, b, c, d: torch.stack([a, b], dim=-1),
    "cat of rows": lambda a, b, c, d: torch.cat([a, b], dim=1),
    "cat of columns": lambda a, b, c, d: torch.cat([a, b, a], dim=-1),
    "transpose": lambda a, b, c, d: a.transpose(1, 2).contiguous(),
    "permute": lambda a, b, c, d: a.permute(2, 0, 1),
    "matrix of all experts": lambda a, b, c, d: c.view(4, 6, 10),
    "matrix of all experts, transposed": lambda a, b, c, d: c.reshape(4, 6, 10).transpose(1, 2),
    "rows in pairs": lambda a, b, c, d: a.reshape(4, 3, 2, 10).transpose(1, 2).reshape(4, 6, 10).contiguous(),
    "chunks": lambda a, b, c, d: torch.cat(a.chunk(2, dim=1)[::-1], dim=1),
    "split": lambda a, b, c, d: torch.cat(torch.split(a, [1, 5], dim=1)[::-1], dim=1),
    "unbound": lambda a, b, c, d: torch.stack(list(torch.unbind(a))[::-1]),
    "squeezed": lambda a, b, c, d: torch.stack([x.squeeze(0) for x in torch.chunk(a, 4)]).unsqueeze(1).flatten(0, 1),
    "flat": lambda a, b, c, d: a.flatten().unflatten(0, (4, 60)),
    "cast": lambda a, b, c, d: torch.cat([a.to(torch.bfloat16), b.to(torch.bfloat16)], dim=1),
    "vectors": lambda a, b, c, d: torch.stack([d, d[:10], c[3]]),
    "promoted": lambda a, b, c, d: torch.cat([a.half(), b]),
    "negative index": lambda a, b, c, d: torch.stack([a[-1], a[-2]])[:, -3:],
}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 6, 10), "b": (4, 6, 10), "c": (24, 10), "d": (10,)}
    real = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(real, folder / "model.safetensors", {"format": "pt"})
    return real, traced_state(open_source(folder).state)


@pytest.mark.parametrize("move", MOVES)
def test_any_part_is_read(tensors, move):
    real, traced = tensors
    wanted, found = MOVES[move](**real), MOVES[move](**traced)
    assert isinstance(found, TracedTensor)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    choose = random.Random(0)
    for _ in range(40):
        index = []
        for size in wanted.shape:
            start = choose.randrange(size)
            index.append(choose.choice([slice(0, size), slice(start, choose.randrange(start, size) + 1)]))
        part = wanted[tuple(index)]
        for dtype in (wanted.dtype, torch.float64):
            out = torch.full(part.shape, torch.nan, dtype=dtype)
            found.piece.read_into(tuple(index), out)
            assert torch.equal(out, part.to(dtype)), (move, index)


def test_memory_need_not_be_contiguous(tensors):
    real, traced = tensors
    out = torch.full((6, 4, 20), torch.nan)[..., ::2].transpose(0, 1)
    traced["a"].piece.read_into(traced["a"].piece.full(), out)
    assert torch.equal(out, real["a"])


def test_one_expert_of_a_matrix_of_all_is_read_alone(tensors):
    """The file is longer than what is read, so reading more would touch the bytes of other experts."""
    _, traced = tensors
    piece = traced["c"].view(4, 6, 10).piece
    (whole,) = stored(piece)
    reads = []

    class Counted:
        def read_into(self, offset, out):
            reads.append((offset - whole.offset, out.nbytes))
            whole.file.read_into(offset, out)

    counted = type(whole)(whole.shape, whole.dtype, Counted(), whole.offset)
    type(piece)(piece.shape, piece.dtype, counted).read_into(
        (slice(2, 3), slice(0, 6), slice(0, 10)), torch.empty(1, 6, 10)
    )
    assert reads == [(2 * 6 * 10 * 4, 6 * 10 * 4)]


def test_a_computed_tensor_is_refused(tensors):
    _, traced = tensors
    doubled = torch.cat([traced["a"] * 2, traced["b"]])
    with pytest.raises(ValueError, match=r"transformers computes it with aten\.mul"):
        doubled.piece.read_into(doubled.piece.full(), torch.empty(8, 6, 10, device="meta"))


def test_a_write_is_noted(tensors):
    _, traced = tensors
    copy = traced["a"].clone()
    copy[1:].view(-1)[0] = 3.0
    assert copy.writes
    assert not traced["a"].writes
