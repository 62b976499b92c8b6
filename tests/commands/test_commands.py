# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These tests cover the commands that no script of a clone has: plan, report, presets and env."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, MixtralForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.commands import env, report
from modeling_moe.commands.main import main
from modeling_moe.commands.presets import _purpose
from modeling_moe.data import DataArguments
from modeling_moe.dispatch import backend_of
from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.utils.presets import presets
from modeling_moe.utils.recipes import CONFIGURATION, recipes
from tests.builders import SHAPE, sample_text, tiny_config, train_tokenizer
from tests.test_trust import bring_code


SIZE = SHAPE | {"vocab_size": 300, "intermediate_size": 48, "max_position_embeddings": 2048}


@pytest.fixture
def moe(monkeypatch, capsys):
    """Runs a command in this process; returns the exit code, what it printed and what it complained about."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["moe"])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        code = 0
        try:
            main([str(part) for part in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def place(tmp_path):
    """Returns a folder with a dense model, two MoE models of two classes, and a text."""
    tokenizer = train_tokenizer()
    models = {
        "dense": AutoModelForCausalLM.from_config(LlamaConfig(**SIZE)),
        "moe": MoEForCausalLM(tiny_config(vocab_size=300)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(sample_text(40), encoding="utf-8")
    return tmp_path


def test_a_plan_needs_config_json_alone_and_is_that_of_upcycle(moe, place):
    flags = ["--model_name_or_path", place / "dense", "--num_experts", 4, "--granularity", 2]
    _, dry, _ = moe("upcycle", *flags, "--output_dir", place / "up", "--dry_run")
    for file in (place / "dense").iterdir():
        if file.name != "config.json":
            file.unlink()
    code, planned, _ = moe("plan", *flags)
    assert code == 0
    assert planned == dry
    assert "computes the dense function │ yes" in planned
    assert "0.2 MiB, float32" in planned
    assert "0.000" not in planned
    assert "0.1 MiB, bfloat16" in moe("plan", *flags, "--dtype", "bfloat16")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "MOE"], "model_type 'moe' cannot be upcycled"),
        (["--model_name_or_path", "DENSE", "--granularity", "3"], "granularity (3) does not divide"),
        (["--model_name_or_path", "DENSE", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["--model_name_or_path", "/nowhere"], "there is no such folder"),
    ],
)
def test_mistakes_of_a_plan(flags, message, moe, place):
    places = {"MOE": place / "moe", "DENSE": place / "dense"}
    code, _, complaint = moe("plan", *(places.get(flag, flag) for flag in flags))
    assert code == 2
    (line,) = [line for line in complaint.splitlines() if line.startswith("moe plan: ")]
    assert message in line


def test_verification_of_a_dry_run_is_refused(moe, place):
    flags = ["--model_name_or_path", place / "dense", "--output_dir", place / "up", "--dry_run", "--verify"]
    code, _, complaint = moe("upcycle", *flags)
    assert code == 2
    assert "verify compares the result, and dry_run makes none" in complaint


@pytest.mark.parametrize(("name", "layers", "top_k"), [("moe", [0, 2], 3), ("mixtral", [0, 1], 2)])
def test_a_report_counts_the_experts_that_the_router_logits_choose(name, layers, top_k, moe, place):
    paths = {option: place / f"load.{option}" for option in ("json", "md", "png")}
    flags = ["--model_name_or_path", place / name, "--data", f"a={place / 'text.txt'}", "--max_length", 32]
    outputs = ["--output_json", paths["json"], "--output_markdown", paths["md"], "--plot", paths["png"]]
    code, printed, _ = moe("report", *flags, *outputs)
    assert code == 0
    (found,) = json.loads(paths["json"].read_text()).values()
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

    markdown = paths["md"].read_text()
    for layer in found:
        assert f"{layer['balance']:.3f}" in printed
        assert f"| {layer['layer']} | {layer['balance']:.3f} | {layer['entropy']:.3f} |" in markdown
    assert paths["png"].read_bytes().startswith(b"\x89PNG")


def test_the_load_of_a_layer_by_hand():
    layer = report.layer_load(7, torch.tensor([4, 0, 2, 2]))
    assert (layer.layer, layer.tokens, layer.balance, layer.dead_experts) == (7, [4, 0, 2, 2], 2.0, [1])
    assert layer.entropy == pytest.approx(1.5 * math.log(2))
    assert layer.row() == ["7", "2.000", "1.040", "2.8 of 4", "1 of 4", "0"]
    even = report.layer_load(0, torch.tensor([3, 3, 3]))
    assert (even.balance, even.dead_experts) == (1.0, [])
    assert even.entropy == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "DENSE"], "LlamaForCausalLM has no experts"),
        (["--model_name_or_path", "MOE", "--plot", "/missing/x.png"], "plot /missing/x.png: make the folder /missing"),
        (["--model_name_or_path", "MOE", "--max_tokens", "3"], "max_tokens 3 is less than a block"),
    ],
)
def test_mistakes_of_a_report(flags, message, moe, place):
    places = {"MOE": place / "moe", "DENSE": place / "dense"}
    code, _, complaint = moe(
        "report", *(places.get(flag, flag) for flag in flags), "--data", f"a={place / 'text.txt'}", "--max_length", 32
    )
    assert code == 2
    (line,) = [line for line in complaint.splitlines() if line.startswith("moe report: ")]
    assert message in line


def test_a_plot_without_matplotlib_is_refused_before_the_model_is_loaded(moe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, complaint = moe("report", "--model_name_or_path", "/nowhere", "--data", "a=b", "--plot", "x.png")
    assert code == 2
    assert "pip install 'modeling-moe[plot]'" in complaint


@pytest.mark.parametrize("command", ["plan", "report"])
def test_code_of_a_checkpoint_does_not_run_without_the_flag(command, moe, place):
    marker = place / "marker"
    bring_code(place / "dense", "model", marker)
    flags = ["--data", f"a={place / 'text.txt'}"] if command == "report" else []
    code, _, complaint = moe(command, "--model_name_or_path", place / "dense", *flags)
    assert code == 2
    assert "--trust_remote_code true" in complaint
    assert not marker.exists()


def test_presets_and_recipes_are_listed_and_shown(moe):
    code, printed, _ = moe("presets")
    assert code == 0
    for name in [*presets(), *recipes()]:
        assert f"│ {name} " in printed
        assert moe("presets", "--show", name)[1] == (presets() | recipes())[name].read_text()
    assert moe("presets", "--folder")[1] == f"{CONFIGURATION}\n"
    row = next(line for line in printed.splitlines() if "olmoe_1b_7b" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["topk", "16", "64, 8", "6.92 B", "1.28 B"]
    code, _, complaint = moe("presets", "--show", "olmo")
    assert code == 2
    assert "show 'olmo' is unknown: it must be one of deepseek_moe_16b, " in complaint


@pytest.mark.parametrize("file", recipes().values(), ids=recipes())
def test_a_recipe_begins_with_its_purpose(file):
    assert 10 < len(_purpose(file)) < 80
    assert file.read_text().startswith(f"# {_purpose(file)}")


def test_env_names_what_a_bug_report_needs(moe):
    code, printed, _ = moe("env", "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["versions"]["torch"] == torch.__version__
    assert {"modeling_moe", "python", "transformers", "peft", "accelerate"} <= set(found["versions"])
    assert set(found["backends"]) == {"native", "loop", "grouped_mm", "triton"}
    _, table, _ = moe("env")
    for name, reasons in found["backends"].items():
        assert f"│ back end {name} " in table
        assert all(f"{device}: {reason or 'available'}" in table for device, reason in reasons.items())


@pytest.mark.parametrize("name", ["native", "loop", "grouped_mm", "triton"])
def test_a_back_end_runs_on_the_devices_that_env_calls_available(name):
    reasons = env.backend_reasons()[name]
    devices = [device for device, reason in reasons.items() if reason is None]
    for device in devices:
        model = MoEForCausalLM(tiny_config(hidden_size=32)).to(device)
        model.set_experts_implementation(f"moe_{name}")
        experts = model.model.layers[0].mlp.experts
        x, index = torch.randn(20, 32, device=device), torch.randint(5, (20, 3), device=device)
        assert backend_of(experts, x, index) == name
        assert experts(x, index, torch.rand(20, 3, device=device)).isfinite().all()
    assert devices or name in ("native", "triton")


def test_env_gives_the_reason_of_a_back_end_that_does_not_run(monkeypatch, moe):
    reasons = {"native": "experts.c is not compiled", "triton": None}
    for name, reason in reasons.items():
        monkeypatch.setitem(
            BACKENDS, name, SimpleNamespace(reason_unavailable=lambda device, dtype, reason=reason: reason)
        )
    monkeypatch.setenv("PATH", "")
    found = json.loads(moe("env", "--json")[1])
    assert {name: found["backends"][name]["cpu"] for name in reasons} == reasons
    assert found["compiler"] == "no gcc on PATH"
    monkeypatch.delitem(BACKENDS, "triton")
    assert "is not installed" in json.loads(moe("env", "--json")[1])["backends"]["triton"]["cpu"]
