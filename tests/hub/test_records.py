# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Damaged records beside a model give one sentence, and no record writes Markdown or a path into a card."""

import base64
import hashlib
import json

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moe.hub.card import card_to_publish, write_model_card
from modeling_moe.hub.wording import markdown_text, without_paths
from modeling_moe.utils.errors import UserError


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAGE = [
    {"base_model": 5},
    {"base_model": {"a": 1}},
    {"license": ["x"]},
    {"language": [["en"]]},
    {"metrics": 5},
    {"anything": "x"},
]
DAMAGED = {
    "conversion.json": [5, [], *({"recipe": {"lineage": lineage}} for lineage in LINEAGE)],
    "finetuning.json": [5, {"eval_loss": {"a": None}}, {"eval_loss": {"a": {"b": 1}}}, {"eval_loss": {"a": "x"}}],
    "scores.json": [5, {"a": 5}, {"a": {"loss": None}}, {"a": {"before": 5}}, {"a": {"loss": [1]}}],
    "tokenizer_config.json": [5, []],
}
MARKS = ["AAAA", "====", [1], 5, {"base_model": 5}, {"metrics": 5}, {"training": [1]}, {"tags": 5}, {"zzz": 1}]


@pytest.fixture
def folder(tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, contents in DAMAGED.items() for content in contents]
)
def test_a_damaged_record_is_one_sentence(folder, name, content):
    """Each of these records once caused a traceback, or appeared in the card unchanged."""
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError):
        card_to_publish(folder, repo_id="you/model", license="mit")


@pytest.mark.parametrize("record", [{}, {"sources": 5}, {"sources": [5]}, {"options": 5}, {"source": {"name": 5}}])
def test_an_empty_recipe_adds_nothing_to_the_card(folder, record):
    (folder / "conversion.json").write_text(json.dumps({"recipe": record}))
    assert "How it was made" not in card_to_publish(folder, repo_id="you/model", license="mit")


@pytest.mark.parametrize("told", MARKS)
def test_a_card_with_a_foreign_mark_is_kept(folder, told):
    text = "a card\n\n"
    code = told if isinstance(told, str) else base64.b64encode(json.dumps(told).encode()).decode()
    mark = f"<!-- modeling_moe card {hashlib.sha256(text.encode()).hexdigest()} {code} -->\n"
    (folder / "README.md").write_text(text + mark)
    assert card_to_publish(folder, repo_id="you/model", license="mit") is None


@pytest.mark.parametrize("architectures", [5, {"a": 1}, [["x"]], [5], [None]])
def test_unknown_architectures_count_as_the_causal_lm(tmp_path, architectures):
    config = {"model_type": "moe", "vocab_size": 64, **SIZES, "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_model_card(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "text-generation"


def test_an_adapter_writes_no_markdown_into_its_card(tmp_path):
    hostile = "x|\n\n# Trusted <script> ![a](b.png) `c`"
    config = {"peft_type": {"a": 1}, "r": hostile, "target_modules": [5, hostile], "base_model_name_or_path": ["a"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = card_to_publish(tmp_path, repo_id="you/adapter", license="mit")
    assert "\n# Trusted" not in text
    assert "<script>" not in text
    assert "![a]" not in text
    assert markdown_text(hostile) == "x\\| # Trusted &lt;script&gt; !\\[a\\](b.png) 'c'"


@pytest.mark.parametrize(
    "value", ["a\n---\nlicense: gpl-3.0\n---\n", "x: y", "!!python/name:os.system", "a\r\n---\r\n"]
)
def test_a_record_adds_no_foreign_metadata(folder, value):
    (folder / "conversion.json").write_text(json.dumps({"recipe": {"lineage": {"license_name": value}}}))
    (folder / "scores.json").write_text(json.dumps({value: {"loss": 1.0}}))
    data = ModelCard(card_to_publish(folder, repo_id="you/model", license="mit")).data
    assert data.license == "mit"
    assert data.license_name == value
    assert data.eval_results[0].dataset_name == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/secret/x.txt", "x.txt"),
        ("math=/home/me/secret/x.txt", "math=x.txt"),
        ("math-1=/home/me/my secret/x.txt", "math-1=x.txt"),
        ("../../customer/x.txt", "x.txt"),
        ("~/secret/x.txt", "x.txt"),
        ("C:\\Users\\me\\x.txt", "x.txt"),
        ("file:///home/me/x.txt", "x.txt"),
        ("read from /home/me/x.txt, /srv/y/z", "read from x.txt, z"),
        ("domain:/home/me/x.txt", "domain:x.txt"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("owner/name", "owner/name"),
        ("and/or a / b 1/2", "and/or a / b 1/2"),
        (["a=/b/c", {"/d/e": 1.5}, None, True], ["a=c", {"e": 1.5}, None, True]),
    ],
)
def test_published_values_contain_no_path_of_this_machine(value, expected):
    """conversion.json contains `domain=/path` from --data and --calibration_data, and is published without the path."""
    assert without_paths(value) == expected
