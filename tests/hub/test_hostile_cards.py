# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""No name, path, domain or text breaks a card's metadata, adds markup to it, or brings a path of this machine into it."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from modeling_moe.hub import write_model_card
from tests.builders import tiny_config


HOSTILE = [
    "a\n---\nlicense: gpl-3.0\n---\n# Trusted",
    "---",
    "# Trusted",
    "![x](https://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "`x`\n```\nrm -rf /\n```",
    "a | b\\| c \\",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "!!python/object:os.system x: [y",
    "'; rm -rf ~; '",
    "/home/me/secret/model",
    "../../home/me/secret",
    "C:\\Users\\me\\model",
    "\u202eevil\u0000\x07\x1b[31m",
    "<!-- modeling_moe card " + "0" * 64 + " e30= -->",
    "| a |\n|---|\n| b |",
    "1. one",
    "*bold* __bold__ ~~struck~~",
    "x" * 10_000,
]


@pytest.fixture
def folder(tmp_path):
    tiny_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def outline(text: str) -> list[str]:
    """Returns the headings, fences, pictures, links, tags and comments of a card, in which no value has a part."""
    text = text[: text.rindex("<!-- modeling_moe card")]
    # nothing is markup in a block of code, which ends with a line of three backticks
    text = re.sub(r"^(```\w+)\n.*?^```$", r"\1", text, flags=re.M | re.S)
    return re.findall(r"^#+ .*$|^```\w*$|^---$|(?<!\\)!?\[[^\]\\]*\]\([^)]*\)|<[a-zA-Z/!][^>]*>", text, flags=re.M)


def shapes(text: str) -> list[int]:
    """Returns the number of unescaped bars of each row of a table."""
    return [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in text.splitlines() if line.startswith("|")]


def card_with(folder, value: str) -> ModelCard:
    (folder / "conversion.json").write_text(
        json.dumps({"recipe": {"sources": [{"name": value}], "options": {"method": value}, "reason_not_exact": value}})
    )
    (folder / "finetuning.json").write_text(
        json.dumps(
            {"base_model": value, "data": {value: value}, "method": value, "loss": {value: {"first": 1, "last": 2}}}
        )
    )
    return write_model_card(
        folder,
        base_model=[value, "owner/base"],
        metrics={value: {"before": {"loss": 2.0}, "after": {"loss": 1.0}}},
        data={value: {"source": value, "tokens": value, "license": value}},
        description=value,
        intended_use=value,
        license="mit",
    )


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_value_changes_neither_metadata_nor_structure(folder, value):
    plain, card = card_with(folder, "plain"), card_with(folder, value)
    head = card.content.split("\n---\n")[0].removeprefix("---\n")
    data, expected = (yaml.safe_load(text) for text in (head, plain.content.split("\n---\n")[0].removeprefix("---\n")))
    assert data.keys() == expected.keys()
    assert (data["license"], data["base_model"]) == ("mit", ["owner/base"])
    assert outline(card.text) == outline(plain.text)
    assert shapes(card.text) == shapes(plain.text)
    assert not any(place in card.content for place in ("/home/me", "Users\\me", str(folder.parent)))
    assert card.text.count("<!--") == 1
    if "7 * 7" in value:
        assert value.replace("*", "\\*") in card.text


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_stays_one_name(folder, value):
    card, plain = write_model_card(folder, repo_id=value), write_model_card(folder, repo_id="plain")
    text, expected = (outline(c.text)[1:] for c in (card, plain))
    assert text == expected
    assert shapes(card.text) == shapes(plain.text)
    assert not any(place in card.content for place in ("/home/me", "Users\\me", str(folder.parent)))
    for block in re.findall(r"```python\n(.*?)```", card.text, flags=re.S):
        compile(block, "card", "exec")
    commands = re.findall(r"```bash\n(.*?)```", card.text, flags=re.S)
    counts = re.findall(r"```bash\n(.*?)```", plain.text, flags=re.S)
    assert [len(c.splitlines()) for c in commands] == [len(c.splitlines()) for c in counts]
