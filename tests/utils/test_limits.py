# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of absurd size is refused within seconds, and nothing of that size is allocated."""

import json
import struct
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moe.conversion import convert_checkpoint
from modeling_moe.utils.chat import render_chat
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.limits import refuse_vast_adapter
from modeling_moe.utils.lineage import card_metadata
from modeling_moe.utils.loading import load_config, load_model, load_tokenizer
from tests.builders import train_tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def quick():
    """Fails the test if it takes 10 seconds or more; an object of the given size would take minutes or all memory."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)).save_pretrained(folder)
    return folder


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("load", [load_model, load_config])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels"])
def test_a_config_of_a_billion_layers_or_labels_is_refused_by_name(llama, load, name):
    edit(llama / "config.json", **{name: 10**9})
    with pytest.raises(UserError, match=f"{name} is 1000000000 in .*config.json: it must be at most"):
        load(str(llama))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "size"), [("vocab_size", 10**10), ("intermediate_size", 10**11), ("num_hidden_layers", 300)]
)
def test_a_config_of_more_parameters_than_the_files_can_hold_is_refused(llama, name, size):
    """transformers would initialise the missing parameters at random before it names them."""
    edit(llama / "config.json", **{name: size})
    with pytest.raises(UserError, match=r"asks for [\d,]+ parameters where the files have [\d,]+ bytes"):
        load_model(str(llama))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(entries: dict[str, tuple[int, bytes]]) -> bytes:
    """Returns a GGUF file without tensors; each entry is a type and bytes."""
    values = b"".join(_text(key) + struct.pack("<I", kind) + data for key, (kind, data) in entries.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + values


GGUF_BOMBS = {
    "a long array": (gguf({"a": (9, struct.pack("<IQ", 4, 10**9))}), "a has 4,000,000,000 bytes where 0 are left"),
    "nested arrays": (gguf({"a": (9, struct.pack("<IQ", 9, 1) * 10_000)}), "a is an array of arrays"),
    "layers": (
        gguf({"general.architecture": (8, _text("llama")), "llama.block_count": (4, struct.pack("<I", 10**8))}),
        "num_hidden_layers is 100000000",
    ),
    "no tensors": (gguf({"general.architecture": (8, _text("llama"))}), "parameters where the files have"),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", GGUF_BOMBS)
def test_a_gguf_bomb_is_refused_when_a_model_is_loaded(tmp_path, kind):
    """Loading a model checks the header of a GGUF file as conversion does."""
    data, message = GGUF_BOMBS[kind]
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "model.gguf"))
    if "array" in kind:
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 10**9}, "r is 1000000000"),
        ({"r": 65_537}, "r is 65537"),
        ({"layer_replication": [[0, 2]] * 50_000}, "makes 100000 layers"),
        ({"layer_replication": [[0, 10_001]]}, "makes 10001 layers"),
        ({"layer_replication": 3}, "must be a list of pairs of layers"),
        ({"layer_replication": [["a", "b"]]}, "must be a list of pairs of layers"),
    ],
)
def test_an_adapter_of_a_billion_ranks_or_layers_is_refused_by_name(tmp_path, fields, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        refuse_vast_adapter(tmp_path)


@pytest.mark.parametrize("fields", [{"r": 65_536}, {"layer_replication": [[0, 5000], [4000, 9000]]}, {}])
def test_an_adapter_at_the_limits_is_accepted(tmp_path, fields):
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    refuse_vast_adapter(tmp_path)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("part", ["{#", "{% raw %}", "{% for", "{% macro"])
def test_a_template_of_unclosed_tags_is_refused_at_once(part):
    tokenizer = train_tokenizer()
    tokenizer.chat_template = part * 100_000
    with pytest.raises(UserError, match="the chat template cannot render"):
        render_chat(tokenizer, [{"role": "user", "content": "x"}])


@pytest.mark.usefixtures("quick")
def test_lists_nested_in_a_sources_card_are_not_written_out(llama, tmp_path):
    """Ten lines of YAML can stand for 10**9 texts, which must not be written to conversion.json."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]" for i in range(8)]
    (llama / "README.md").write_text("\n".join(["---", "license: mit", *lines, "language: *i", "---", ""]))
    assert card_metadata(llama) == {"license": "mit"}
    convert_checkpoint(str(llama), tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "conversion.json").read_text())["recipe"]
    assert recipe["lineage"] == {"license": "mit"}
