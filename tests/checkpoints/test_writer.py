"""transformers and safetensors load every written checkpoint, whatever went wrong during writing."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor, check_hashes, open_source, write_checkpoint, writer
from modeling_moe.utils.errors import UserError
from tests.builders import add_small_files, folder_contents, tiny_config


RECIPE = {"source": "somewhere", "seed": 1}


def six_tensors() -> dict[str, torch.Tensor]:
    return {f"t{number}": torch.full((100,), float(number)) for number in range(6)}


def write(folder: Path, tensors=None, recipe=RECIPE, finish=add_small_files, **options) -> None:
    """Writes three shards of two tensors each, unless other arguments are given."""
    tensors = six_tensors() if tensors is None else tensors
    state = {name: t if isinstance(t, LazyTensor) else LazyTensor.of(t) for name, t in tensors.items()}
    options = {"max_shard_size": 800, "progress": False} | options
    write_checkpoint(folder, state, recipe, finish, **options)


def raises(error):
    def load(index):
        raise error

    return LazyTensor((100,), torch.float32, load)


def failing_at(number: int, error: BaseException) -> dict:
    return {**six_tensors(), f"t{number}": raises(error)}


@pytest.fixture
def expected(tmp_path):
    """Returns the folder of a run that nothing interrupted."""
    write(tmp_path / "reference")
    return folder_contents(tmp_path / "reference")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def partial(tmp_path):
    return tmp_path / ".out.partial"


@pytest.mark.parametrize("max_shard_size", ["1GB", 300, 1])
def test_safetensors_reads_every_dtype(out, max_shard_size):
    tensors = {
        "z.half": torch.randn(5).to(torch.bfloat16),
        "a.scalar": torch.tensor(3.0),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(3, 4, dtype=torch.float64),
        "eighth": torch.randn(7).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
        "step": torch.tensor(7),
        "transposed": torch.randn(4, 30).T,
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    parts = [LazyTensor.of(torch.randn(2, 3)) for _ in range(3)]
    write(
        out, {**tensors, "stack": LazyTensor.stack(parts), "cat": LazyTensor.cat(parts)}, max_shard_size=max_shard_size
    )
    tensors |= {"stack": torch.stack([p.read() for p in parts]), "cat": torch.cat([p.read() for p in parts])}
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name
    assert check_hashes(out, progress=False) == sorted(file.name for file in out.glob("*.safetensors"))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_transformers_loads_the_copy_of_a_model(tmp_path, out, max_shard_size):
    model = MoEForCausalLM(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    write_checkpoint(
        out,
        open_source(tmp_path / "source").state,
        RECIPE,
        lambda folder: shutil.copy(tmp_path / "source" / "config.json", folder),
        max_shard_size=max_shard_size,
        progress=False,
    )
    loaded, info = MoEForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    index = out / "model.safetensors.index.json"
    assert index.exists() == (max_shard_size == "20KB")
    if index.exists():
        theirs = json.loads((tmp_path / "source" / index.name).read_text())
        assert json.loads(index.read_text())["metadata"] == theirs["metadata"]


def test_recipe_and_hashes_stay_in_the_result(out):
    write(out)
    description = json.loads((out / "conversion.json").read_text())
    assert description["recipe"] == RECIPE
    assert len((out / "SHA256SUMS").read_text().splitlines()) == 3 + 4
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((out / name).read_bytes()).hexdigest()


def test_large_tensor_gets_a_shard_of_its_own(out):
    write(out, {"a": torch.zeros(10), "large": torch.zeros(1000), "b": torch.zeros(10)})
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(weight_map.values()).count(weight_map["large"]) == 1
    assert weight_map["a"] == weight_map["b"]


def test_folder_that_is_not_empty(out, tmp_path):
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        write(out)
    with pytest.raises(UserError, match="holds precious, which no run of this package wrote"):
        write(out, overwrite=True)
    assert folder_contents(tmp_path) == {"out/precious": b"x"}


def test_too_little_space_is_reported_before_anything_is_written(out, tmp_path):
    vast = LazyTensor((1 << 50,), torch.float32, lambda index: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"needs 4503599\.\d GB where .* are free"):
        write(out, {"vast": vast})
    assert not list(tmp_path.iterdir())


def test_text_that_is_no_shard_size(out):
    with pytest.raises(UserError, match="max_shard_size 'big' is no size"):
        write(out, max_shard_size="big")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken"), UserError("bad tensor")])
def test_interrupted_run_goes_on(out, partial, expected, error):
    with pytest.raises(type(error)):
        write(out, failing_at(3, error))
    assert sorted(folder_contents(partial)) == ["SHA256SUMS", "conversion.json", "model-00001-of-00003.safetensors"]
    unread = {"t0": raises(AssertionError("t0 was read again")), "t1": raises(AssertionError("t1 was read again"))}
    write(out, six_tensors() | unread)
    assert folder_contents(out) == expected
    assert not partial.exists()


def test_nothing_is_left_where_no_shard_was_finished(out, tmp_path):
    with pytest.raises(RuntimeError):
        write(out, failing_at(1, RuntimeError()))
    assert not list(tmp_path.iterdir())


def test_error_in_finish_keeps_the_shards(out, partial, expected):
    def broken(folder):
        (folder / "half-written").write_text("x")
        raise UserError("no tokenizer")

    with pytest.raises(UserError, match="no tokenizer"):
        write(out, finish=broken)
    assert (partial / "model-00003-of-00003.safetensors").exists()
    write(out, {name: raises(AssertionError("read again")) for name in six_tensors()})
    assert folder_contents(out) == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_disk_that_becomes_full(out, partial, expected, monkeypatch):
    original = writer.part_of

    def on_full_device(file):
        part = original(file)
        if "00003-of" in part.name:
            part.symlink_to("/dev/full")
        return part

    with monkeypatch.context() as patch:
        patch.setattr(writer, "part_of", on_full_device)
        with pytest.raises(UserError, match=r"No space left .* same command again, it goes on after shard 2 of 3$"):
            write(out)
    assert len([name for name in folder_contents(partial) if "safetensors" in name]) == 2
    write(out)
    assert folder_contents(out) == expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_for_the_first_shard(out, tmp_path, code):
    with pytest.raises(UserError, match=r"^No space left .* run the same command again$"):
        write(out, failing_at(0, OSError(code, "full")))
    assert not list(tmp_path.iterdir())


def test_other_disk_errors_are_raised_unchanged(out):
    with pytest.raises(OSError, match="burning"):
        write(out, failing_at(0, OSError(errno.EIO, "burning")))


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "forget"])
def test_damaged_shard_is_written_again(out, partial, expected, damage):
    with pytest.raises(RuntimeError):
        write(out, failing_at(5, RuntimeError()))
    shard = partial / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        shard.unlink()
    elif damage == "forget":
        sums = (partial / "SHA256SUMS").read_text().splitlines()
        (partial / "SHA256SUMS").write_text(sums[1] + "\n")
    else:
        shard.write_bytes(data if damage == "flip" else data[:-7])
    (partial / "model-00003-of-00003.safetensors.77.part").write_text("half")
    kept = {name: raises(AssertionError("read again")) for name in ("t2", "t3")}
    write(out, six_tensors() | kept)
    assert folder_contents(out) == expected


@pytest.mark.parametrize("change", ["recipe", "layout", "shard size"])
def test_interrupted_run_of_another_kind(out, partial, expected, change):
    with pytest.raises(RuntimeError):
        write(out, failing_at(5, RuntimeError()))
    before = folder_contents(partial)
    options = {"recipe": {"recipe": {**RECIPE, "seed": 2}}, "layout": {}, "shard size": {"max_shard_size": 400}}[
        change
    ]
    tensors = six_tensors() | ({"t5": torch.zeros(99)} if change == "layout" else {})
    with pytest.raises(UserError, match=r"\.out\.partial holds an interrupted run"):
        write(out, tensors, **options)
    assert folder_contents(partial) == before
    write(out, overwrite=True, **options)
    assert folder_contents(out).keys() >= {"conversion.json", "config.json"}
    assert not partial.exists()
    if change == "layout":
        assert folder_contents(out) == expected


def test_overwrite_goes_on_too(out, expected):
    write(out, {"old": torch.ones(3)})
    before = folder_contents(out)
    with pytest.raises(RuntimeError):
        write(out, failing_at(5, RuntimeError()), overwrite=True)
    assert folder_contents(out) == before
    unread = {f"t{number}": raises(AssertionError("read again")) for number in range(4)}
    write(out, six_tensors() | unread, overwrite=True)
    assert folder_contents(out) == expected


def test_old_folder_comes_back_if_the_new_one_cannot_take_its_place(out, monkeypatch):
    write(out)
    before = folder_contents(out)
    rename = Path.rename

    def refuse(path, target):
        if path.name == ".out.partial":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        write(out, {"other": torch.zeros(3)}, overwrite=True)
    assert folder_contents(out) == before


@pytest.mark.parametrize("wrong", [torch.zeros(99), torch.zeros(100, dtype=torch.float16)])
def test_tensor_of_another_size_or_dtype_than_announced(out, wrong):
    with pytest.raises(RuntimeError, match=r"t0 (has|is) .* announced"):
        write(out, {"t0": LazyTensor((100,), torch.float32, lambda index: wrong)})


def test_what_a_check_measures_is_kept_in_the_record(out):
    write(out, check=lambda folder: {"largest_difference": 1e-5})
    description = json.loads((out / "conversion.json").read_text())
    assert description["verification"] == {"largest_difference": 1e-5}
    assert description["recipe"] == RECIPE
    check_hashes(out)
    write(out, overwrite=True)
    assert "verification" not in json.loads((out / "conversion.json").read_text())


def test_a_run_that_was_killed_after_its_check_goes_on(out, partial, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer.ResultFolder, "commit", raises_at_once)
        with pytest.raises(KeyboardInterrupt):
            write(out, check=lambda folder: {"largest_difference": 1e-5})
    assert "verification" in json.loads((partial / "conversion.json").read_text())
    write(out, {name: raises(AssertionError("read again")) for name in six_tensors()})
    assert folder_contents(out) == expected


def test_a_record_of_another_run_is_no_record_of_this_one(out, partial, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer.ResultFolder, "commit", raises_at_once)
        with pytest.raises(KeyboardInterrupt):
            write(out, recipe=RECIPE | {"seed": 2}, check=lambda folder: {"largest_difference": 1e-5})
    with pytest.raises(UserError, match="holds an interrupted run with other options"):
        write(out)


def raises_at_once(folder):
    raise KeyboardInterrupt
