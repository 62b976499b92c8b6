"""A source gives the tensors that safetensors gives, and a damaged source is refused before any tensor is read."""

import hashlib
import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints import (
    LazyTensor,
    check_hashes,
    open_source,
    refuse_quantised,
    safetensors_format,
    sources,
)
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config


TENSORS = {
    "a.matrix": torch.arange(91.0).reshape(7, 13),
    "b.half": torch.arange(60.0).reshape(3, 4, 5).to(torch.bfloat16),
    "c.scalar": torch.tensor(2.5),
    "d.mask": torch.tensor([True, False, True]),
    "e.empty": torch.empty(0, 3),
    "f.blocks": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
}


@pytest.fixture
def sharded(tmp_path):
    """Returns a folder with two shards and an index whose name has a prefix."""
    names = sorted(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:])):
        shard = f"weights-{number}.safetensors"
        save_file({name: TENSORS[name] for name in part}, tmp_path / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(folder, weight_map):
    (folder / "weights.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(params=[1 << 24, 40])
def block(request, monkeypatch):
    """Tensors are read in one piece, and in pieces so small that every larger tensor takes several."""
    monkeypatch.setattr(safetensors_format, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_tensors_are_those_of_the_files(sharded):
    state = open_source(sharded).state
    assert state.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        lazy = state[name]
        assert (lazy.shape, lazy.dtype) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(lazy.read(), expected)
        assert torch.equal(torch.cat([chunk.reshape(-1) for chunk in lazy.chunks()]), expected.reshape(-1))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "index", [slice(2, 5), (slice(None), slice(3, 8)), (slice(1, 6), slice(12, 13)), 4, slice(-2, None)]
)
def test_parts_of_a_matrix(sharded, index):
    part = open_source(sharded).state["a.matrix"][index]
    assert torch.equal(part.read(), TENSORS["a.matrix"][index])


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "index", [1, (1, slice(2, 4)), (slice(None), slice(None), slice(1, 3)), (slice(0, 2), 3, slice(4, 5))]
)
def test_parts_of_a_stack(sharded, index):
    part = open_source(sharded).state["b.half"][index]
    assert torch.equal(part.read(), TENSORS["b.half"][index])


def test_only_the_part_asked_for_is_read(sharded, monkeypatch):
    matrix = open_source(sharded).state["a.matrix"]
    counts = []
    read = safetensors_format._read_rows
    monkeypatch.setattr(
        safetensors_format,
        "_read_rows",
        lambda file, name, offset, shape, dtype: counts.append(shape) or read(file, name, offset, shape, dtype),
    )
    matrix[2:4].read()
    assert counts == [(2, 13)]


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_model_that_transformers_saved(tmp_path, max_shard_size):
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    expected = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            expected |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    state = open_source(tmp_path).state
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].read(), expected[name]) for name in expected)


def test_missing_shard(sharded):
    (sharded / "weights-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks weights-1.safetensors, which its index names"):
        open_source(sharded)


def test_index_decides_which_of_two_copies_of_a_tensor_is_taken(sharded):
    copies = {name: tensor + 1 for name, tensor in TENSORS.items() if tensor.is_floating_point()}
    shards = {shard: load_file(sharded / shard) for shard in ("weights-0.safetensors", "weights-1.safetensors")}
    for shard, tensors in shards.items():
        save_file(copies | tensors, sharded / shard)
    both = load_file(sharded / "weights-0.safetensors").keys() & load_file(sharded / "weights-1.safetensors").keys()
    assert {"a.matrix", "b.half", "c.scalar"} <= both
    state = open_source(sharded).state
    assert state.keys() == TENSORS.keys()
    assert all(torch.equal(state[name].read(), TENSORS[name]) for name in TENSORS)


def test_tensor_that_only_the_index_has(sharded):
    write_index(sharded, {**dict.fromkeys(TENSORS, "weights-0.safetensors"), "ghost": "weights-0.safetensors"})
    with pytest.raises(UserError, match=r"weights-0.safetensors lacks c.scalar, which the index promises"):
        open_source(sharded)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(sharded, keep):
    file = sharded / "weights-0.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"weights-0.safetensors (is truncated|has \d+ bytes where)"):
        open_source(sharded)


def test_file_that_is_something_else(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"no JSON in this file" * 3)
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        open_source(tmp_path)


def test_file_that_shrinks_while_it_is_read(sharded):
    state = open_source(sharded).state
    file = sharded / "weights-0.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="became shorter while it was read"):
        state["b.half"].read()


def test_pickled_checkpoint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="save the model as safetensors first"):
        open_source(tmp_path)


def test_two_indices(sharded):
    (sharded / "other.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match="has 2 indices"):
        open_source(sharded)


def test_file_that_is_no_index(sharded):
    (sharded / "weights.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is damaged: its weight_map must give"):
        open_source(sharded)


def test_dtype_that_torch_lacks(tmp_path):
    header = json.dumps({"packed": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match=r"packed in .* has dtype F4, which cannot be read: dequantise"):
        open_source(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantised_tensor(dtype):
    state = {"good": LazyTensor.of(torch.zeros(2)), "bad": LazyTensor.of(torch.zeros(2).to(dtype))}
    with pytest.raises(UserError, match=r"^bad is .*dequantise it first$"):
        refuse_quantised(state)
    state.pop("bad")
    refuse_quantised(state)


def test_name_that_exists_neither_on_disk_nor_on_the_hub(monkeypatch):
    def offline(name, allow_patterns):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(sources, "snapshot_download", offline)
    with pytest.raises(UserError, match="someone/something is neither a folder nor a model"):
        open_source("someone/something")


def test_from_the_hub_only_what_the_index_names_is_fetched(sharded, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sources, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(sharded)
    )
    assert open_source("someone/something").folder == sharded
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert {"weights-0.safetensors", "weights-1.safetensors"} <= set(asked[1])


def write_sums(folder):
    files = sorted(folder.glob("*.safetensors"))
    (folder / "SHA256SUMS").write_text(
        "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()} *{f.name}\n" for f in files)
    )


def test_hashes(sharded):
    assert check_hashes(sharded, progress=False) == []
    write_sums(sharded)
    assert check_hashes(sharded, progress=False) == ["weights-0.safetensors", "weights-1.safetensors"]
    file = sharded / "weights-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"weights-1.safetensors differs from its hash"):
        check_hashes(sharded, progress=False)
    file.unlink()
    with pytest.raises(UserError, match=r"lists weights-1\.safetensors"):
        check_hashes(sharded, progress=False)
    (sharded / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(UserError, match="'nonsense'"):
        check_hashes(sharded, progress=False)
