# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These tests cover `moe report`: the figures that it prints and writes, the page, and one line for each mistake."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.commands import report
from modeling_moe.data import DataArguments
from tests.builders import folder_contents, sample_text, tiny_config, train_tokenizer
from tests.monitoring.synthetic_report import synthetic_history


@pytest.fixture
def run(moe, place):
    """Runs `moe report` on the text in blocks of 32 tokens; words in capitals are models and files in the folder."""

    def run_report(*flags, data=("a=TEXT",)):
        places = {name.upper(): str(place / name) for name in ("moe", "dense", "mixtral", "out", "state", "load.json")}
        places["TEXT"] = str(place / "text.txt")

        def located(flag):
            name, equals, source = str(flag).rpartition("=")
            return name + equals + places.get(source, source)

        given = ["--data", *map(located, data), "--max_length", 32] if data else []
        return moe("report", *map(located, flags), *given)

    return run_report


def complaint(result) -> str:
    """Returns the one line of a mistake."""
    code, _, errors = result
    assert code == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("moe report: ")]
    return line


@pytest.mark.parametrize(("name", "layers", "top_k"), [("moe", [0, 2], 3), ("mixtral", [0, 1], 2)])
def test_the_table_counts_the_experts_that_the_router_logits_choose(name, layers, top_k, run, place):
    code, printed, _ = run("--model_name_or_path", name.upper(), "--output_json", "LOAD.JSON")
    assert code == 0
    (found,) = json.loads((place / "load.json").read_text()).values()
    assert [layer["layer"] for layer in found] == layers

    model = AutoModelForCausalLM.from_pretrained(place / name).eval()
    args = report.ReportArguments(str(place / name))
    _, domains = report.load_for_scoring(args, DataArguments([f"a={place / 'text.txt'}"], max_length=32))
    expected = torch.zeros(len(layers), model.config.num_experts, dtype=torch.long)
    with torch.no_grad():
        for block in domains["a"]["input_ids"]:
            logits = model(torch.tensor([block]), output_router_logits=True).router_logits
            for row, layer in enumerate(logits):
                chosen = layer.topk(top_k).indices.flatten()
                expected[row] += torch.bincount(chosen, minlength=expected.shape[1])
    assert [layer["tokens"] for layer in found] == expected.tolist()
    for layer in found:
        tokens = layer["tokens"]
        assert layer["max_violation"] == pytest.approx(max(tokens) * len(tokens) / sum(tokens) - 1)
        assert layer["mean_experts"] == top_k
        assert layer["token_entropy"] < layer["marginal_entropy"] <= math.log(len(layer["tokens"]))
        assert f"│ {layer['max_violation']:.3f} " in printed


def test_the_load_of_a_layer_by_hand():
    layer = report.layer_load(7, np.array([4, 0, 2, 2]))
    assert (layer.layer, layer.tokens, layer.max_violation, layer.dead_experts) == (7, [4, 0, 2, 2], 1.0, [1])
    assert layer.entropy == pytest.approx(1.5 * math.log(2))
    assert layer.row("7 (attention)") == ["7 (attention)", "1.000", "1.040", "2.8 of 4", "1 of 4", "0"]
    even = report.layer_load(0, np.array([3, 3, 3]))
    assert (even.max_violation, even.dead_experts) == (0.0, [])
    assert even.entropy == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "DENSE"], "LlamaForCausalLM is a dense model"),
        (["--model_name_or_path", "MOE", "--compare", "DENSE"], "LlamaForCausalLM is a dense model"),
        (["--model_name_or_path", "MOE", "--compare", "/nowhere"], "/nowhere"),
        (["--model_name_or_path", "MOE", "--output_json", "/missing/x.json"], "make the folder /missing first"),
        (["--model_name_or_path", "MOE", "--max_tokens", "3"], "max_tokens 3 is less than a block"),
        (["--model_name_or_path", "MOE", "--max_length", "65"], "more than the model's 64 positions"),
        (["--model_name_or_path", "MOE", "--texts_per_domain", "-1"], "texts_per_domain is -1: it must be at least 0"),
        (["--model_name_or_path", "MOE", "--text_tokens", "0"], "text_tokens is 0: it must be at least 1"),
        (["--model_name_or_path", "MOE", "--seed", "-1"], "seed is -1: it must be at least 0"),
        ([], "model_name_or_path is missing"),
        (["--history", "STATE"], "output_dir is missing"),
        (["--history", "STATE", "--output_dir", "OUT", "--compare", "MOE"], "need --model_name_or_path"),
        (["--history", "STATE", "--output_dir", "OUT"], "state does not exist"),
    ],
)
def test_mistakes(flags, message, run, place):
    """The text comes first, so that a flag of the mistake has the last word."""
    assert message in complaint(run("--data", "a=TEXT", "--max_length", 32, *flags, data=()))
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((), "data is missing"),
        (("a=TEXT", "a=TEXT"), "names the domain 'a' twice"),
        (("wiki=TEXT", "\uff57iki=TEXT"), "look alike"),
        (("a\x1b[31m=TEXT",), "the control character U+001B"),
        (("a\u202eb=TEXT",), "the control character U+202E"),
        (("a\u2028b=TEXT",), "the control character U+2028"),
        ((" =TEXT",), "rename one"),
        (("a=/nowhere.txt",), "/nowhere.txt does not exist"),
        (("a=BINARY",), "is binary"),
        (("a=LATIN",), "is not text in UTF-8"),
        (("a=EMPTY",), "holds no text"),
        (("a=LETTER",), "fewer than the 2 tokens"),
    ],
)
def test_mistakes_in_the_texts(data, message, run, place):
    (place / "binary.txt").write_bytes(b"a\0b" * 40)
    (place / "latin.txt").write_bytes("führt über".encode("latin-1"))
    (place / "empty.txt").write_text("")
    (place / "letter.txt").write_text("a")
    for file in ("BINARY", "LATIN", "EMPTY", "LETTER"):
        data = [entry.replace(file, str(place / f"{file.lower()}.txt")) for entry in data]
    tokenizer = train_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(place / "moe")
    assert message in complaint(run("--model_name_or_path", "MOE", "--output_dir", "OUT", data=data))
    assert not (place / "out").exists()


def test_a_model_without_tokenizer_is_refused(run, place):
    for file in (place / "moe").glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in complaint(run("--model_name_or_path", "MOE"))
    assert "has no tokenizer" in complaint(run("--model_name_or_path", "MIXTRAL", "--compare", "MOE"))


@pytest.mark.parametrize("router", ["soft_moe", "lory"])
def test_a_router_that_mixes_is_refused(router, run, place):
    config = tiny_config(vocab_size=300, router_type=router, allow_noncausal=True, num_experts_per_tok=5)
    MoEForCausalLM(config).save_pretrained(place / "moe")
    assert "sends no tokens to experts" in complaint(run("--model_name_or_path", "MOE", "--output_dir", "OUT"))
    assert "sends no tokens to experts" in complaint(run("--model_name_or_path", "MIXTRAL", "--compare", "MOE"))
    assert not (place / "out").exists()


def test_the_page_shows_the_texts_and_is_replaced_only_on_demand(run, place):
    flags = ["--model_name_or_path", "MOE", "--output_dir", "OUT", "--texts_per_domain", 1]
    domains = ["a</script>/b=TEXT", "<b>x=TEXT"]
    code, printed, errors = run(*flags, data=domains)
    assert code == 0, errors
    assert "</script>/b" in printed
    assert str(place / "out" / "report.html") in printed.replace("\n", "")
    page = (place / "out" / "report.html").read_text()
    assert "a</script>/b" not in page
    assert "&lt;b&gt;x" in page or "\\u003cb" in page
    pictures = list((place / "out").glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)

    before = folder_contents(place / "out")
    assert "is not empty" in complaint(run(*flags, data=domains))
    assert "dense model" in complaint(run("--model_name_or_path", "DENSE", "--output_dir", "OUT", "--overwrite"))
    assert folder_contents(place / "out") == before
    assert run(*flags, "--overwrite")[0] == 0
    assert (place / "out" / "report.html").read_text() != page
    (place / "out" / "mine.txt").write_text("keep me")
    assert "mine.txt" in complaint(run(*flags, "--overwrite"))
    assert [path.name for path in place.iterdir() if "partial" in path.name or "replaced" in path.name] == []


def test_two_models_side_by_side(run, place):
    shutil.copytree(place / "moe", place / "out" / "after")
    model = MoEForCausalLM.from_pretrained(place / "moe")
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight.neg_()
    model.save_pretrained(place / "out" / "after")
    flags = ["--model_name_or_path", "MOE", "--compare", place / "out" / "after", "--output_json", "LOAD.JSON"]
    code, printed, errors = run(*flags)
    assert code == 0, errors
    found = json.loads((place / "load.json").read_text())
    assert [len(model["a"]) for model in found["models"]] == [2, 2]
    assert [change["layer"] for change in found["changes"]] == [0, 2]
    assert found["changes"][0]["changed_tokens"] == 0
    assert found["changes"][1]["changed_tokens"] > 0.5
    loads = [np.array(model["a"][1]["tokens"]) for model in found["models"]]
    shift = np.abs(loads[0] / loads[0].sum() - loads[1] / loads[1].sum()).sum() / 2
    assert found["changes"][1]["load_shift"] == pytest.approx([shift])
    assert "What moved" in printed
    assert f"{shift:.1%}" in printed
    assert "related models" in printed


def test_models_of_two_families_are_compared_as_far_as_it_goes(run, place):
    code, printed, errors = run("--model_name_or_path", "MOE", "--compare", "MIXTRAL")
    assert code == 0, errors
    assert "differ in the number of experts" in " ".join(printed.split())
    assert "What moved" not in printed


def write_state(folder, entries, **more):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries} | more))


def test_a_shared_report_holds_no_path_of_this_machine(run, place):
    write_state(place / "state", synthetic_history(2, 4, seed=0))
    shutil.copytree(place / "moe", place / "after" / "moe")
    flags = [
        "--model_name_or_path",
        "MOE",
        "--compare",
        place / "after" / "moe",
        "--output_dir",
        "OUT",
        "--history",
        "STATE",
    ]
    code, _, errors = run(*flags)
    assert code == 0, errors
    files = [file for file in (place / "out").iterdir() if file.suffix in (".html", ".json")]
    assert len(files) == 2
    for file in files:
        assert str(place.parent) not in file.read_text(encoding="utf-8")
    assert "after/moe" in (place / "out" / "report.html").read_text(encoding="utf-8")
    recipe = json.loads((place / "out" / "conversion.json").read_text())["recipe"]
    assert recipe == {
        "report": f"{place.name}/moe",
        "compare": "after/moe",
        "history": "state",
        "data": {"a": "text.txt"},
    }


def test_models_are_shown_by_as_few_parent_folders_as_tell_them_apart(tmp_path, monkeypatch):
    for folder in ("a/x/moe", "b/x/moe", "c"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "x" / "moe")
    assert report.shown_names([str(tmp_path / "a/x/moe/"), str(tmp_path / "b/x/moe")]) == ["a/x/moe", "b/x/moe"]
    assert report.shown_names([".", str(tmp_path / "c")]) == ["moe", "c"]
    assert report.shown_names([".", "."]) == ["moe", "moe"]
    assert report.shown_names(["allenai/OLMoE-1B-7B-0924", "."]) == ["allenai/OLMoE-1B-7B-0924", "moe"]


def test_the_history_of_a_run_is_drawn_without_a_model(run, place):
    entries = [{"step": 1, "loss": 2.0}, *synthetic_history(2, 4, seed=0), {"step": 40, "eval_loss": 1.0}]
    write_state(place / "state" / "checkpoint-5", [])
    write_state(place / "state" / "checkpoint-40", entries)
    code, printed, errors = run("--history", "STATE", "--output_dir", "OUT", data=())
    assert code == 0, errors
    assert "report.html" in printed
    assert list((place / "out").glob("*.png"))


def test_the_history_stands_beside_two_models(run, place, monkeypatch):
    """The page of such a report is tested where pages are."""
    write_state(place / "state", synthetic_history(2, 4, seed=0))
    drawn = []
    monkeypatch.setattr(report, "write_report", lambda result, folder: drawn.append(result))
    flags = ["--model_name_or_path", "MOE", "--compare", "MOE", "--output_dir", "OUT", "--texts_per_domain", 2]
    code, _, errors = run(*flags, "--text_tokens", 9, "--top_tokens", 3, "--history", "STATE")
    assert code == 0, errors
    (result,) = drawn
    assert [model.name for model in result.models] == ["moe"] * 2
    assert [len(text.tokens) for text in result.models[0].texts] == [9, 9]
    assert max(len(tokens) for layer in result.models[0].layers for tokens in layer.top_tokens) == 3
    assert [change.changed_tokens for change in result.changes.layers] == [0, 0]
    assert len(result.history) == 4


def test_a_history_keeps_finite_numbers_of_entries_with_routing(place):
    entry = {"step": 3, "routing/max_violation": 0.5, "routing/x": math.nan, "note": "text", "loss": 1, "flag": True}
    write_state(place / "state", [{"step": 2, "loss": 1.0}, entry])
    found = report.read_history(str(place / "state" / "trainer_state.json"))
    assert found == [{"step": 3, "routing/max_violation": 0.5, "loss": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "its log_history must be a list of objects"),
        ('{"log_history": [1]}', "its log_history must be a list of objects"),
        ('{"log_history": [{"routing/max_violation": 1.0}]}', "has no step"),
        ('{"log_history": [{"step": 1, "loss": 1.0}]}', "holds no routing figures"),
        (None, "holds no trainer_state.json"),
    ],
)
def test_mistakes_in_a_history(text, message, run, place):
    (place / "state").mkdir()
    if text is not None:
        (place / "state" / "trainer_state.json").write_text(text)
    assert message in complaint(run("--history", "STATE", "--output_dir", "OUT", data=()))
    assert not (place / "out").exists()


def test_texts_without_a_model_are_refused(run, place):
    write_state(place / "state", synthetic_history(2, 4, seed=0))
    assert "the texts of --data need a model" in complaint(run("--history", "STATE", "--output_dir", "OUT"))


def test_a_page_without_matplotlib_is_refused_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--model_name_or_path", "/nowhere", "--output_dir", "OUT"]
    assert "pip install" in complaint(run(*flags))


def test_control_characters_and_long_lines_reach_the_page_as_text(run, place):
    hostile = "</script><img src=x onerror=alert(1)>\x07\x1b[31m \u202eabc " + "y" * 10_000 + "\n"
    (place / "text.txt").write_text(hostile + sample_text(10), encoding="utf-8")
    code, _, errors = run("--model_name_or_path", "MIXTRAL", "--output_dir", "OUT")
    assert code == 0, errors
    page = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "\x1b" not in page
