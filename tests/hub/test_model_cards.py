# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The cards in model_cards/ are those that scripts/model_cards.py writes now."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import model_cards
from modeling_moe.configuration_derived import PER_LAYER
from modeling_moe.hub import card as card_module
from modeling_moe.utils.presets import presets


CARDS = Path(__file__).parents[2] / "model_cards"
STALE = "the card is stale: run python scripts/model_cards.py"


def test_the_package_reads_the_template_of_this_folder():
    assert card_module.TEMPLATE.resolve() == (CARDS / "card.md.jinja").resolve()


@pytest.mark.parametrize("name", presets())
def test_the_card_of_a_tiny_model_is_current(name, tmp_path):
    written = model_cards.write_tiny_card(name, presets()[name], tmp_path)
    assert written.read_text(encoding="utf-8") == (CARDS / "tiny" / f"{name}.md").read_text(encoding="utf-8"), STALE


def test_the_demos_card_is_current(tmp_path):
    written = model_cards.write_demo_card_from(CARDS / "demo", tmp_path)
    assert written.read_text(encoding="utf-8") == (CARDS / "demo" / "README.md").read_text(encoding="utf-8"), STALE


def test_no_other_card_lies_here_and_the_index_names_all():
    there = {str(file.relative_to(CARDS)) for file in CARDS.rglob("*.md")} - {"README.md"}
    assert there == {"demo/README.md", *(f"tiny/{name}.md" for name in presets())}
    index = (CARDS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(((?:demo|tiny)/[\w/]+\.md)\)", index)) == there


@pytest.mark.parametrize("name", presets())
def test_a_tiny_model_keeps_every_field_but_sizes(name):
    values = json.loads(presets()[name].read_text())
    tiny = model_cards.tiny_config(values)
    sizes = {*model_cards.SIZES, *model_cards.SMALLER_SIZES, *model_cards.TOKENS, *PER_LAYER}
    for field in values.keys() - sizes - {"num_key_value_heads", "rope_parameters", "model_type", "architectures"}:
        assert getattr(tiny, field) == values[field], field
    assert set(tiny.mlp_layer_types) == set(values.get("mlp_layer_types", ["sparse"]))


def test_the_records_of_the_demo_hold_no_place_of_a_machine():
    for file in (CARDS / "demo").rglob("*.json"):
        assert not re.search(r'"/\w|\b/(?:home|tmp|root|work)/', file.read_text(encoding="utf-8")), file.name


def test_the_demos_card_shows_its_run():
    card = ModelCard.load(CARDS / "demo" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["base_model_relation"]) == ("apache-2.0", "finetune")
    after = json.loads((CARDS / "demo" / "records" / "after.json").read_text())
    index = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert all(index[domain, "loss"] == score["loss"] for domain, score in after.items())
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.text):
        assert (CARDS / "demo" / picture).stat().st_size > 10_000
    assert card.text.count("![") == 2
