"""Damaged, changed or endless sources are refused at once, and the message names the damage."""

import json
import os
import random
import shutil
import signal
import struct
import threading
import time

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from modeling_moe.checkpoints import LazyTensor, UnusableError, open_source, write_checkpoint
from modeling_moe.checkpoints.safetensors_format import read_tensors
from modeling_moe.conversion import convert_checkpoint, open_checkpoint
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.sizes import size_text
from tests.builders import SMALLEST
from tests.checkpoints.test_gguf import write_llama


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALLEST)).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def left(tmp_path) -> list[str]:
    return sorted(file.name for file in tmp_path.iterdir() if file.name != "source")


HEADERS = {
    "overlap": {"a": ONE, "b": ONE | {"data_offsets": [4, 12]}},
    "hole": {"a": ONE, "b": ONE | {"data_offsets": [16, 24]}},
    "hole at the start": {"a": ONE | {"data_offsets": [8, 16]}},
    "negative start": {"a": ONE | {"data_offsets": [-8, 0]}, "b": ONE},
    "duplicate name": '{"a": %s, "a": %s}' % (json.dumps(ONE), json.dumps(ONE | {"data_offsets": [8, 16]})),  # noqa: UP031
    "bytes at the end": {"a": ONE},
    "a size that is no product": {"a": ONE | {"shape": [3]}},
    "a vast shape": {"a": ONE | {"shape": [2**63, 2]}},
    "a list": [1, 2],
    "a tensor that is a number": {"a": 3},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_the_reference_reader_refuses_is_refused(tmp_path, name):
    header = HEADERS[name]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(24 if "hole" in name else 12 if name == "overlap" else 16)
    )
    with pytest.raises(UserError, match=r"model\.safetensors (has|is damaged|is no)") as caught:
        read_tensors(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_where_floats_belong_are_refused_by_name(source, tmp_path, dtype):
    change_tensors(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16).to(dtype)}))
    with pytest.raises(UserError, match=r"tensor for model\.norm\.weight is (int64|bool) where float32 belongs"):
        convert_checkpoint(str(source), tmp_path / "out")
    assert not left(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("check", [False, True])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(source, tmp_path, value, dtype, check):
    def damage(tensors):
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = value

    change_tensors(source, damage)
    if check:
        from tests.builders import train_tokenizer

        train_tokenizer().save_pretrained(source)
    with pytest.raises(
        UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in .*safetensors holds NaN or infinity"
    ):
        convert_checkpoint(str(source), tmp_path / "out", check=check)
    assert not left(tmp_path)


def test_a_weight_that_overflows_in_the_chosen_dtype_is_named(source, tmp_path):
    change_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(UnusableError, match=r"model\.norm\.weight of the result holds NaN or infinity: it overflows"):
        convert_checkpoint(str(source), tmp_path / "out", dtype="float16")
    assert not left(tmp_path)


def test_damage_after_complete_shards_leaves_nothing(tmp_path):
    state = {name: LazyTensor.of(torch.ones(100)) for name in "abc"}
    state["c"] = LazyTensor.of(torch.full((100,), float("nan")))
    with pytest.raises(UnusableError, match="c of the result"):
        write_checkpoint(tmp_path / "out", state, {}, lambda folder: None, max_shard_size=400, progress=False)
    assert not left(tmp_path)


def test_a_source_whose_bytes_change_between_kill_and_resume_is_noticed(source, tmp_path):
    """A changed source with equal size and time would give a mixture of two sources."""
    from modeling_moe.conversion import saving

    opened = open_checkpoint(str(source))
    last = list(opened.state)[-1]
    real = opened.state[last]

    def stop(index):
        raise KeyboardInterrupt

    def convert(state):
        recipe = {"source": opened.identity()}
        saving.save_checkpoint(tmp_path / "out", opened.config, state, opened, recipe, max_shard_size="2KB")

    with pytest.raises(KeyboardInterrupt, match="the same command again, it goes on after shard"):
        convert(opened.state | {last: LazyTensor(real.shape, real.dtype, stop)})
    assert (tmp_path / ".out.partial").exists()
    file = source / "model.safetensors"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    with pytest.raises(UserError, match=r"\.out\.partial holds an interrupted run with other options, another source"):
        convert(opened.state)
    data[-5] ^= 1
    file.write_bytes(data)
    convert(opened.state)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    "shard",
    [
        "../private/secret.safetensors",
        "/etc/passwd",
        "link.safetensors",
        "..",
        "",
        "a/../../private/secret.safetensors",
    ],
)
def test_an_index_reads_nothing_outside_its_folder(source, tmp_path, shard):
    secret = tmp_path / "private" / "secret.safetensors"
    secret.parent.mkdir()
    (source / "model.safetensors").rename(secret)
    (source / "link.safetensors").symlink_to("../private/secret.safetensors")
    weight_map = dict.fromkeys(load_file(secret), shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UserError, match=r"outside|lacks|is no file|no index"):
        convert_checkpoint(str(source), tmp_path / "out")
    assert left(tmp_path) == ["private"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "templates"])
def test_a_link_that_leads_outside_is_not_followed(source, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    if name == "templates":
        (source / "chat_template_folder").symlink_to("../outside")
        (outside / "secret").write_text("{}")
    else:
        (source / name).touch()
        (source / name).rename(outside / name)
        (source / name).symlink_to(f"../outside/{name}")
    with pytest.raises(UserError, match="is a link that leads outside the folder"):
        convert_checkpoint(str(source), tmp_path / "out")
    assert left(tmp_path) == ["outside"]


def test_links_of_the_hubs_cache_are_followed(source, tmp_path):
    cache = tmp_path / "cache" / "models--a--b"
    snapshot = cache / "snapshots" / "123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert_checkpoint(str(snapshot), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["../tiny.gguf", "/x/tiny.gguf", "link.gguf"])
def test_a_gguf_file_outside_the_folder_is_not_read(tmp_path, name):
    (tmp_path / "source").mkdir()
    write_llama(tmp_path / "tiny.gguf")
    (tmp_path / "source" / "link.gguf").symlink_to("../tiny.gguf")
    with pytest.raises(UserError, match=r"gguf_file .* (is a path|is not in)|leads outside"):
        open_source(tmp_path / "source", name)


def test_the_path_of_a_gguf_file_is_accepted(tmp_path):
    write_llama(tmp_path / "tiny.gguf")
    opened = open_source(tmp_path / "tiny.gguf")
    assert (opened.folder, opened.gguf_file) == (tmp_path, "tiny.gguf")


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '{"model_type": ["llama"]}', '{"model_type": {}}', "{", '{"a":' * 10**5]
)
def test_a_config_that_is_no_object_is_one_line(source, tmp_path, text):
    (source / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        convert_checkpoint(str(source), tmp_path / "out")
    assert "config.json" in str(caught.value)
    assert not left(tmp_path)


@pytest.mark.parametrize("weight_map", [[], 3, None, {"a": 3}, {"a": None}, {"a": ["x"]}])
def test_an_index_of_something_else_is_one_line(source, tmp_path, weight_map):
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        convert_checkpoint(str(source), tmp_path / "out")


def test_a_pickled_checkpoint_alone_is_one_line(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has the pickled pytorch_model\.bin and no model\.safetensors"):
        open_source(source)


@pytest.mark.parametrize("layers", [10**5, 10**9, 1e30, 19])
def test_more_layers_than_tensors_are_refused_at_once(source, tmp_path, layers):
    change_json(source / "config.json", num_hidden_layers=layers)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"num_hidden_layers|no tensor for|cannot be"):
        convert_checkpoint(str(source), tmp_path / "out")
    assert time.monotonic() - start < 10
    assert not left(tmp_path)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [10**12, 1e30, 10**30, -5, 0])
def test_an_absurd_size_is_refused_at_once(source, tmp_path, field, value):
    change_json(source / "config.json", **{field: value})
    start = time.monotonic()
    with pytest.raises((UserError, StrictDataclassError)) as caught:
        convert_checkpoint(str(source), tmp_path / "out")
    assert time.monotonic() - start < 10
    assert any(word in str(caught.value) for word in ("config", "tensor", field))
    assert not left(tmp_path)


def test_more_layers_than_tensors_are_refused_in_older_families(tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    change_json(tmp_path / "source" / "config.json", n_layer=10**5)
    with pytest.raises(UserError, match="n_layer is 100000"):
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "out")


def gguf_with(tmp_path, key: bytes, kind: int, value: bytes):
    """Returns a GGUF file with one additional metadata entry."""
    write_llama(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    entries = int.from_bytes(data[16:24], "little") + 1
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    (tmp_path / "tiny.gguf").write_bytes(data[:16] + entries.to_bytes(8, "little") + entry + data[24:])


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IQ", 4, 10**9), r"a\.b has 4,000,000,000 bytes where"),
        (struct.pack("<IQ", 8, 10**9), r"a\.b has 8,000,000,000 bytes where"),
        (struct.pack("<IQ", 4, 2**63), r"a\.b has .* bytes where"),
        (struct.pack("<IQ", 77, 1), "unknown type 77"),
        (nested(1), "array of arrays"),
        (nested(250_000), "array of arrays"),
    ],
)
def test_a_gguf_array_longer_than_the_file_is_refused_at_once(tmp_path, value, message):
    gguf_with(tmp_path, b"a.b", 9, value)
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, "tiny.gguf")
    assert time.monotonic() - start < 5


def test_a_gguf_file_with_too_many_tensors_or_layers_is_refused(tmp_path):
    write_llama(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data[:8] + (10**12).to_bytes(8, "little") + data[16:])
    with pytest.raises(UserError, match="do not fit into"):
        open_source(tmp_path, "tiny.gguf")
    at = data.index(b"llama.block_count") + len("llama.block_count") + 4
    (tmp_path / "tiny.gguf").write_bytes(data[:at] + (10**9).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(UserError, match="asks for 1000000000 layers"):
        open_source(tmp_path, "tiny.gguf")


def test_a_gguf_weight_that_is_not_finite_is_named(tmp_path):
    write_llama(tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf", "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    tensor.data[3] = np.nan
    reader.data.flush()
    state = open_source(tmp_path, "tiny.gguf").state
    with pytest.raises(UnusableError, match=r"output_norm\.weight in .*tiny\.gguf holds NaN or infinity"):
        state["model.norm.weight"].read()


@pytest.mark.parametrize(
    ("weights", "message", "end"),
    [
        (True, "holds a model and an adapter", r", or move adapter_config\.json away to take the model alone"),
        (False, "is an adapter of some/base", ""),
    ],
)
def test_an_adapter_is_not_dropped_silently(source, tmp_path, weights, message, end):
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    if not weights:
        (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"{message}.*merge it first: moe merge_adapter .*merged{end}$"):
        convert_checkpoint(str(source), tmp_path / "out")
    assert not left(tmp_path)


def test_verify_without_a_tokenizer_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        convert_checkpoint(str(source), tmp_path / "out", check=True)
    assert not left(tmp_path)


def test_bytes_needed_round_up_and_bytes_free_round_down():
    assert size_text(8 * 10**6 + 1) == "8.1 MB"
    assert size_text(8 * 10**6 + 1, up=False) == "8.0 MB"
    assert size_text(0) == "0.0 MB"
    assert size_text(1) == "0.1 MB"
    assert size_text(10**9) == size_text(10**9, up=False) == "1.0 GB"
    assert size_text(10**15 + 1) == "1000000.1 GB"
    dice = random.Random(0)
    for _ in range(1000):
        free = dice.randrange(10**9 - 10**6)
        assert size_text(free + dice.randint(1, 1000)) != size_text(free, up=False)


def test_no_bar_is_printed_before_the_line_that_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(8, 0, 7 * 10**6))
    state = {"a": LazyTensor((2 * 10**6,), torch.float32, None)}
    with pytest.raises(UserError, match=r"needs 8\.1 MB where 7\.0 MB are free: free 1\.1 MB"):
        write_checkpoint(tmp_path / "out", state, {}, lambda folder: None)
    assert capsys.readouterr() == ("", "")
    assert not left(tmp_path)


def test_ctrl_c_at_any_moment_neither_hangs_nor_leaves_half_a_file(tmp_path, monkeypatch):
    """A hashing thread once made Ctrl-C hang for 524 s, so no thread may run."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    clock, main = random.Random(0), threading.main_thread().ident
    state = {f"t{number}": LazyTensor.of(torch.full((50_000,), float(number))) for number in range(8)}
    stopped, before = 0, set(threading.enumerate())
    for number in range(60):
        out = tmp_path / f"out{number}"
        timer = threading.Timer(clock.uniform(0, 0.03), signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            write_checkpoint(out, state, {}, lambda folder: None, max_shard_size=400_000, progress=False)
            timer.join()
        except KeyboardInterrupt:
            stopped += 1
        assert set(threading.enumerate()) <= {*before, timer}
        partial = tmp_path / f".out{number}.partial"
        assert not list(partial.glob("*.part")) if partial.exists() else True
        write_checkpoint(out, state, {}, lambda folder: None, overwrite=True, max_shard_size=400_000, progress=False)
        assert torch.equal(open_source(out).state["t7"].read(), torch.full((50_000,), 7.0))
    assert stopped > 10


def test_a_result_that_its_check_refuses_is_not_kept_to_be_refused_again(tmp_path):
    def refuse(folder):
        assert (folder / "model-00003-of-00003.safetensors").exists()
        raise UserError("the result differs")

    state = {name: LazyTensor.of(torch.ones(100)) for name in "abc"}
    with pytest.raises(UnusableError, match="the result differs"):
        write_checkpoint(
            tmp_path / "out", state, {}, lambda folder: None, max_shard_size=400, progress=False, check=refuse
        )
    assert not left(tmp_path)
