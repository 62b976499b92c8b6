"""docs/config.md is what the metadata of the configuration fields says."""

from dataclasses import fields
from pathlib import Path

import pytest

from modeling_moe import MoEConfig
from modeling_moe.configuration_derived import DERIVED
from modeling_moe.configuration_fields import settings_of
from modeling_moe.utils.config_page import TITLES, page


DOCS = Path(__file__).parents[2] / "docs"
SETTINGS = settings_of(MoEConfig)


def test_the_page_is_current():
    assert (DOCS / "config.md").read_text(encoding="utf-8") == page(), (
        "docs/config.md is out of date: run python -m modeling_moe.utils.config_page docs/config.md"
    )


def test_each_field_is_declared_in_one_group_and_on_the_page_once():
    declared = [item.name for group in TITLES for item in fields(group)]
    assert sorted(declared) == sorted(SETTINGS)
    text = page()
    assert all(text.count(f"\n| `{name}` |") == 1 for name in declared)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_help_is_sentences_that_point_nowhere(name):
    text = SETTINGS[name].help
    assert text[0].isupper()
    assert text.endswith(".")
    assert not {"same", "such", "see", "there"}.intersection(text.lower().replace(".", " ").split())


def test_fields_that_follow_from_others_are_those_with_a_rule():
    assert {name for name, declared in SETTINGS.items() if declared.follows is not None} == set(DERIVED)
