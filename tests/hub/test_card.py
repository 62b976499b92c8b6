# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
import ast
import json
import re
import socket

import pytest
import torch
from huggingface_hub import ModelCard

from modeling_moe import MoEConfig, MoEForCausalLM, MoEForSequenceClassification
from modeling_moe.hub import write_model_card
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config


METRICS = {
    "wiki": {
        "before": {"loss": 3.25, "perplexity": 25.79, "load": [1, 2]},
        "after": {"loss": 3.0, "perplexity": 20.086, "bits_per_byte": 1.125},
    },
    "source code": {"after": {"loss": 2}},
}
FULL = {
    "repo_id": "someone/tiny-moe",
    "base_model": ["someone/dense", "/data/runs/my-dense"],
    "license": "mit",
    "metrics": METRICS,
    "upcycling": {"method": "copy", "num_experts": 6, "seed": None, "noise": 0.01, "layers": [0, 2]},
    "training": {"learning_rate": 1e-5, "files": {"wiki": "/data/wiki|en.jsonl"}, "lora": True},
}


def shared_config(**kwargs) -> MoEConfig:
    fields = {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts": 6, "num_experts_per_tok": 2}
    return tiny_config(**fields | {"num_shared_experts": 2} | kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    MoEForCausalLM(shared_config()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a card is written without network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def facts(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, flags=re.M))


def sections(card: ModelCard) -> dict[str, str]:
    titles_and_bodies = re.split(r"^#+ (.+)$", re.sub(r"```.*?```", "code", card.text, flags=re.S), flags=re.M)[1:]
    return dict(zip(titles_and_bodies[::2], titles_and_bodies[1::2], strict=True))


def code_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.S)


@pytest.mark.parametrize("arguments", [{}, FULL], ids=["bare", "full"])
def test_parses_back(saved, arguments):
    written = write_model_card(saved, **arguments)
    card = ModelCard.load(saved / "README.md")
    assert card.content == written.content
    assert card.data.to_dict() == written.data.to_dict()
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["moe", "modeling_moe"]


@pytest.mark.parametrize(
    "arguments",
    [{}, FULL, {"upcycling": {}, "training": {"seed": None}, "metrics": {}}, {"base_model": "/data/dense"}],
    ids=["bare", "full", "empty", "local base"],
)
def test_no_empty_sections_or_values(saved, arguments):
    card = write_model_card(saved, **arguments)
    for title, body in sections(card).items():
        assert body.strip(), f"section {title} is empty"
    assert not re.search(r"\bNone\b|\bnull\b|\{\{|\}\}|\{%|/data", card.content)
    assert "\n\n\n" not in card.content
    assert all(value.strip() for value in facts(card).values())


def test_sections_follow_the_arguments(saved):
    assert list(sections(write_model_card(saved))) == ["tiny", "Use", "Limits"]
    full = write_model_card(saved, **FULL)
    assert list(sections(full)) == ["someone/tiny-moe", "How it was made", "Results", "Use", "Limits"]


def test_states_the_true_numbers_of_parameters(saved):
    model = MoEForCausalLM.from_pretrained(saved)
    total = model.num_parameters()
    unused = 4 * sum(3 * 32 * 24 for layer in model.model.layers if layer.is_sparse)
    told = facts(write_model_card(saved))
    assert told == {
        "Layers": "3, of which 2 sparse",
        "Routed experts": "6, width 24",
        "Experts per token": "2",
        "Shared experts": "2, together of width 48",
        "Router": "`topk` on softmax scores, weights divided by their sum",
        "Router losses in training": "load balance 0.01, z-loss 0.001",
        "Total parameters": f"{total:,}",
        "Active parameters per token": f"{total - unused:,}",
        "Hidden size": "32",
        "Context": "64 tokens",
        "Data type": "bfloat16",
    }


def test_deepseek_router(tmp_path):
    config = shared_config(
        scoring_func="sigmoid",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        router_selection_bias=True,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
    )
    config.save_pretrained(tmp_path)
    told = facts(write_model_card(tmp_path))
    assert told["Router"] == (
        "`topk` on sigmoid scores, weights divided by their sum, scaled by 2.5, 2 of 3 groups, bias on the selection"
    )
    assert "Router losses in training" not in told
    assert "Data type" not in told


def test_dense_model_claims_no_experts(tmp_path):
    config = tiny_config(mlp_layer_types=["dense"] * 3)
    config.save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    shown = facts(card)
    assert shown["Layers"] == "3, of which 0 sparse"
    assert shown["Total parameters"] == shown["Active parameters per token"] == f"{config.num_params():,}"
    assert "Routed experts" not in shown
    assert "although a token uses only" not in card.text


def test_other_heads_are_counted_as_they_are(tmp_path):
    model = MoEForSequenceClassification(shared_config(num_labels=5))
    model.save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert facts(card)["Total parameters"] == f"{model.num_parameters():,}"
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    assert "generate" not in card.text


def test_results(saved):
    card = write_model_card(saved, **FULL)
    results = sections(card)["Results"]
    assert (
        "| Domain | Loss, before | Loss, after | Perplexity, before | Perplexity, after | Bits per byte, after |"
        in (results)
    )
    assert "| wiki | 3.250 | 3.000 | 25.790 | 20.086 | 1.125 |" in results
    assert "| source code | - | 2.000 | - | - | - |" in results
    index = [(r.dataset_name, r.dataset_type, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert sorted(index) == [
        ("source code", "source-code", "loss", 2.0),
        ("wiki", "wiki", "bits_per_byte", 1.125),
        ("wiki", "wiki", "loss", 3.0),
        ("wiki", "wiki", "perplexity", 20.086),
    ]
    assert card.data.model_name == "tiny-moe"


def test_results_without_a_comparison(saved):
    results = sections(write_model_card(saved, metrics={"wiki": {"loss": 3.0, "perplexity": 20.086}}))["Results"]
    assert "| Domain | Loss | Perplexity |\n|---|---:|---:|\n| wiki | 3.000 | 20.086 |" in results
    assert "before" not in results


def test_sources(saved):
    card = write_model_card(saved, **FULL)
    assert card.data.base_model == ["someone/dense"]
    assert "Made from `someone/dense`, `my-dense`." in card.text
    told = facts(card)
    assert (told["Method"], told["Noise"], told["Layers"]) == ("copy", "0.01", "0, 2")
    assert (told["Learning rate"], told["Lora"]) == ("1e-05", "yes")
    assert r"| Files | wiki: wiki\|en.jsonl |" in card.text


def test_snippets(saved):
    for block in code_blocks(write_model_card(saved)):
        ast.parse(block)
    trusting, installed = code_blocks(write_model_card(saved, repo_id=str(saved)))
    assert "trust_remote_code=True" in trusting
    names = {}
    exec(installed, names)
    assert isinstance(names["model"], MoEForCausalLM)


def test_a_folder_without_code_promises_none(tmp_path):
    shared_config().save_pretrained(tmp_path)
    assert "trust_remote_code" not in write_model_card(tmp_path).text


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (None, {}, "has no config.json"),
        ({"model_type": "no such model"}, {}, "the configuration of .* cannot be loaded"),
        ([1], {}, r"config\.json is damaged"),
        ({"model_type": "moe"}, {"license": "Some License"}, "license 'Some License' is no identifier"),
        ({"model_type": "moe"}, {"metrics": {"wiki": {"accuracy": 1.0}}}, "metrics of domain 'wiki'"),
    ],
    ids=["no config", "unknown model", "damaged", "no license", "unknown measure"],
)
def test_refuses(tmp_path, config, arguments, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        write_model_card(tmp_path, **arguments)
    assert not (tmp_path / "README.md").exists()
