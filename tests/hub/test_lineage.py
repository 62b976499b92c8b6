# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Base model, license and language of a source's card reach the card of every model that is made from it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moe.conversion import convert_checkpoint
from modeling_moe.hub import write_model_card
from modeling_moe.utils.lineage import card_metadata, hub_name, lineage_of
from tests.builders import train_tokenizer


CARD = "---\nlicense: other\nlicense_name: our-license\nlicense_link: LICENSE\nlanguage:\n- de\ntags: [x]\n---\n# A card\n"


@pytest.fixture
def llama(tmp_path):
    """Returns a source as the Hub's cache stores it."""
    folder, tokenizer = tmp_path / "models--owner--dense" / "snapshots" / "0a1b", train_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def test_lineage_is_carried_through_two_conversions_to_the_card(llama, tmp_path):
    """The card of a model that was converted twice names the first source, its license and its language."""
    expected = {
        "base_model": "owner/dense",
        "license": "other",
        "license_name": "our-license",
        "license_link": "LICENSE",
        "language": ["de"],
    }
    assert lineage_of(llama) == expected
    convert_checkpoint(str(llama), tmp_path / "moe")
    recipe = json.loads((tmp_path / "moe" / "conversion.json").read_text())["recipe"]
    assert recipe["lineage"] == expected
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "again", dtype="bfloat16")
    assert lineage_of(tmp_path / "again") == expected
    data = write_model_card(tmp_path / "again").data.to_dict()
    assert {name: data[name] for name in expected} == expected | {"base_model": ["owner/dense"]}


def test_an_unreadable_card_gives_no_lineage(llama):
    for text in ("no metadata", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n"):
        (llama / "README.md").write_text(text)
        assert card_metadata(llama) == {}


def test_only_the_hubs_cache_has_a_hub_name(llama, tmp_path):
    assert hub_name(llama) == "owner/dense"
    copy = shutil.copytree(llama, tmp_path / "copy")
    assert hub_name(copy) is None
    assert hub_name(Path("/")) is None
