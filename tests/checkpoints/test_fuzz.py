"""Randomly damaged files are converted correctly, or refused at once in one line without leaving files behind."""

import json
import random
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from modeling_moe.conversion import convert_checkpoint, load_state, open_checkpoint
from modeling_moe.utils.errors import UserError
from tests.builders import SMALLEST
from tests.checkpoints.test_gguf import write_llama


SECONDS = 30
IDS = torch.arange(3, 12)[None]
SHARD = "model-00001-of-*.safetensors"
WEIGHTS, INDEX, CONFIG, GGUF = "model.safetensors", "model.safetensors.index.json", "config.json", "tiny.gguf"
ODD = (
    None,
    -1,
    0,
    1,
    3,
    10**5,
    10**12,
    1e30,
    1e-30,
    True,
    "x",
    "llama",
    "moe",
    [],
    {},
    [1, 2],
    {"a": 1},
    "../x",
    "/x",
    0.5,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Returns a checkpoint in one file, in two shards, and in GGUF."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sources")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALLEST))
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="10KB")
    assert (root / "sharded" / INDEX).exists()
    (root / "gguf").mkdir()
    write_llama(root / "gguf" / GGUF)
    return root


def _header(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(header: dict | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


def _tensor(header: dict, dice: random.Random) -> str:
    return dice.choice([name for name in header if name != "__metadata__"])


def flip(data: bytes, dice: random.Random, stop: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        changed[dice.randrange(min(stop or len(data), len(data)))] = dice.randrange(256)
    return bytes(changed)


def truncate(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def append(data: bytes, dice: random.Random) -> bytes:
    return data + dice.randbytes(dice.randint(1, 64))


def flip_header(data: bytes, dice: random.Random) -> bytes:
    return flip(data, dice, 8 + int.from_bytes(data[:8], "little"))


def offsets(data: bytes, dice: random.Random) -> bytes:
    """Makes an overlap, a hole or a negative start."""
    header, body = _header(data)
    entry = header[_tensor(header, dice)]
    shift, (start, end) = dice.choice([-4, 4, -64, 64, -(10**6), 10**12]), entry["data_offsets"]
    entry["data_offsets"] = dice.choice([[start + shift, end + shift], [start + shift, end], [start, end + shift]])
    return _with_header(header, body)


def swap_offsets(data: bytes, dice: random.Random) -> bytes:
    """Gives two tensors the same place."""
    header, body = _header(data)
    first, second = dice.sample([name for name in header if name != "__metadata__"], 2)
    header[first]["data_offsets"] = header[second]["data_offsets"]
    return _with_header(header, body)


def dtype(data: bytes, dice: random.Random) -> bytes:
    header, body = _header(data)
    header[_tensor(header, dice)]["dtype"] = dice.choice(["I64", "BOOL", "F16", "I32", "U8", "F4", "F64", "x", 3])
    return _with_header(header, body)


def dtype_that_fits(data: bytes, dice: random.Random) -> bytes:
    """Replaces a floating dtype by an integer dtype of the same width."""
    header, body = _header(data)
    header[_tensor(header, dice)]["dtype"] = "I32"
    return _with_header(header, body)


def shape(data: bytes, dice: random.Random) -> bytes:
    header, body = _header(data)
    entry = header[_tensor(header, dice)]
    entry["shape"] = dice.choice(
        [entry["shape"][::-1], [*entry["shape"], 1], [-1], [2**62, 4], [], "x", [0, *entry["shape"]]]
    )
    return _with_header(header, body)


def duplicate(data: bytes, dice: random.Random) -> bytes:
    header, body = _header(data)
    name = _tensor(header, dice)
    text = json.dumps(header)
    return _with_header(f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}', body)


def rename(data: bytes, dice: random.Random) -> bytes:
    header, body = _header(data)
    name = _tensor(header, dice)
    header[dice.choice(["x", f"{name}.x", ""])] = header.pop(name)
    return _with_header(header, body)


def not_finite(data: bytes, dice: random.Random) -> bytes:
    header, body = _header(data)
    at = 4 * dice.randrange(len(body) // 4)
    number = torch.tensor(dice.choice([float("nan"), float("inf"), -float("inf")])).numpy().tobytes()
    return _with_header(header, body[:at] + number + body[at + 4 :])


def json_value(data: bytes, dice: random.Random) -> bytes:
    """Replaces a value of the object or of an object inside it."""
    values = json.loads(data)
    inner = values.get("weight_map", values) if dice.random() < 0.8 else values
    inner[dice.choice(sorted(inner))] = dice.choice(ODD)
    return json.dumps(values).encode()


def json_key(data: bytes, dice: random.Random) -> bytes:
    values = json.loads(data)
    inner = values.get("weight_map", values)
    value = inner.pop(dice.choice(sorted(inner)))
    if dice.random() < 0.3:
        inner["surprise"] = value
    return json.dumps(values).encode()


def json_whole(data: bytes, dice: random.Random) -> bytes:
    deep = '{"a":' * 10**5
    return dice.choice(
        ["[]", "3", "null", '"x"', "", "{}", "NaN", deep, '{"model_type": ["llama"]}', '{"weight_map": []}']
    ).encode()


def gguf_header(data: bytes, dice: random.Random) -> bytes:
    return flip(data, dice, 1500)


def gguf_length(data: bytes, dice: random.Random) -> bytes:
    at = dice.choice([8, 16, data.index(b"general.architecture") - 8])
    return data[:at] + dice.choice([10**9, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[at + 8 :]


# kind -> folder, file, and function that damages the file's bytes
KINDS = {
    f"{file}: {change.__name__}": (folder, file, change)
    for folder, file, changes in (
        ("single", WEIGHTS, [flip, flip_header, truncate, append, offsets, swap_offsets, dtype, dtype_that_fits]),
        ("single", WEIGHTS, [shape, duplicate, rename, not_finite]),
        ("sharded", SHARD, [flip, flip_header, truncate, rename]),
        ("sharded", INDEX, [flip, truncate, json_value, json_key, json_whole]),
        ("single", CONFIG, [flip, truncate, json_value, json_key, json_whole]),
        ("gguf", GGUF, [flip, truncate, gguf_header, gguf_length]),
    )
    for change in changes
}
# kinds of damage that are wrong for every random choice
NEVER = (
    "offsets",
    "swap_offsets",
    "dtype_that_fits",
    "duplicate",
    "rename",
    "not_finite",
    "append",
    "truncate",
    "gguf_length",
)


@contextmanager
def bounded():
    """Fails if the block takes longer than SECONDS."""

    def stop(number, frame):
        raise TimeoutError(f"it takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(kind: str, seed: int, sources, tmp_path):
    folder, file, change = KINDS[kind]
    target = tmp_path / f"source-{seed}"
    shutil.copytree(sources / folder, target)
    (path,) = target.glob(file)
    data = path.read_bytes()
    changed = change(data, random.Random(f"{kind} {seed}"))
    path.write_bytes(changed)
    return target, changed != data


def is_right(checkpoint, folder, logits: bool) -> bool:
    """Returns whether an accepted checkpoint has the tensors and logits that safetensors and transformers read from it."""
    if checkpoint.source.gguf_file:
        theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        stored = theirs.state_dict()
    else:
        stored = {}
        for file in checkpoint.source.files:
            stored |= load_file(folder / file)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager") if logits else None
    if not all(torch.equal(tensor.read(), stored[name]) for name, tensor in checkpoint.state.items()):
        return False
    if not logits:
        return True
    expected, got = (model.eval()(IDS).logits for model in (theirs, load_state(checkpoint.config, checkpoint.state)))
    return torch.allclose(got, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def attack(kind: str, seed: int, sources, tmp_path, whole: bool) -> str:
    """Opens and reads, or converts, one damaged source; returns the outcome."""
    folder, changed = damaged(kind, seed, sources, tmp_path)
    gguf_file = GGUF if kind.startswith(GGUF) else None
    try:
        with bounded():
            # this GGUF file has no tokenizer, so it cannot be converted
            if whole and not gguf_file:
                convert_checkpoint(str(folder), tmp_path / "out", gguf_file=gguf_file)
                shutil.rmtree(tmp_path / "out")
            checkpoint = open_checkpoint(str(folder), gguf_file)
            for tensor in checkpoint.state.values():
                tensor.read()
    except (UserError, StrictDataclassError):
        left = [file.name for file in tmp_path.iterdir() if not file.name.startswith("source-")]
        assert not left, f"{kind} {seed} left {left}"
        return "refused"
    assert is_right(checkpoint, folder, logits=kind.startswith(CONFIG)), (
        f"{kind} {seed} was converted to something else"
    )
    assert not changed or not kind.endswith(NEVER) or ".json" in kind, f"{kind} {seed} was accepted"
    return "converted"


def campaign(kind: str, seeds, sources, tmp_path) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        outcomes = {seed: attack(kind, seed, sources, tmp_path, whole=not seed % 6) for seed in seeds}
    finally:
        logging.set_verbosity(verbosity)
    for seed in seeds:
        shutil.rmtree(tmp_path / f"source-{seed}")
    assert set(outcomes.values()) <= {"refused", "converted"}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_correctly(kind, sources, tmp_path):
    campaign(kind, range(5), sources, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_refused_or_read_correctly(kind, sources, tmp_path):
    for start in range(100, 220, 20):
        campaign(kind, range(start, start + 20), sources, tmp_path)


@pytest.mark.parametrize("folder", ["single", "sharded", "gguf"])
def test_undamaged_sources_are_accepted(folder, sources, tmp_path):
    """The undamaged sources are accepted; a fuzz test of sources that are always refused would prove nothing."""
    gguf_file = GGUF if folder == "gguf" else None
    if not gguf_file:
        convert_checkpoint(str(sources / folder), tmp_path / "out")
    assert is_right(open_checkpoint(str(sources / folder), gguf_file), sources / folder, logits=True)
