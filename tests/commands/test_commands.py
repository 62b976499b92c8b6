# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These tests cover the commands that no script of a clone has: plan, presets and env."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, ViTConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.commands import env
from modeling_moe.commands.presets import _purpose
from modeling_moe.dispatch import backend_of
from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.utils.presets import presets
from modeling_moe.utils.recipes import CONFIGURATION, recipes
from tests.builders import SHAPE, tiny_config
from tests.planning.families import LATENT
from tests.test_trust import bring_code


def test_a_plan_of_an_upcycling_needs_config_json_alone_and_begins_with_that_of_upcycle(moe, place):
    flags = ["--model_name_or_path", place / "dense", "--num_experts", 4, "--granularity", 2]
    _, dry, _ = moe("upcycle", *flags, "--output_dir", place / "up", "--dry_run")
    for file in (place / "dense").iterdir():
        if file.name != "config.json":
            file.unlink()
    flags += ["--device", "CPU", "--sequence_length", 8, "--train", "lora"]
    code, planned, _ = moe("plan", *flags)
    assert code == 0
    assert planned.startswith(dry)
    assert "lora, float32, recompute none" in planned
    assert "computes the dense function │ yes" in planned
    assert "0.2 MB, float32" in planned
    assert "0.000" not in planned
    assert "0.1 MB, bfloat16" in moe("plan", *flags, "--dtype", "bfloat16")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "MOE", "--num_experts", "4"], "model_type 'moe' cannot be upcycled"),
        (["--model_name_or_path", "DENSE", "--granularity", "3"], "granularity (3) does not divide"),
        (["--model_name_or_path", "DENSE", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["--model_name_or_path", "/nowhere"], "there is no such folder"),
        (["--model_name_or_path", "nowhere.json"], "nowhere.json does not exist"),
        (["--model_name_or_path", "moe_tiny", "--device", "H900"], "device 'H900' is unknown: it must be measure"),
        (["--model_name_or_path", "moe_tiny", "--batch_size", "0"], "batch_size is 0: it must be at least 1"),
        (["--model_name_or_path", "moe_tiny", "--train", "half"], "train 'half' is unknown"),
        (["--model_name_or_path", "moe_tiny", "--ep_size", "3", "--device", "CPU"], "ep_size must divide"),
        (["--model_name_or_path", "moe_tiny", "--device", "CPU", "--device_memory", "0"], "device_memory is 0.0"),
        (["--model_name_or_path", "moe_tiny", "--json", "/nowhere/a.json"], "make the folder /nowhere first"),
        (["--model_name_or_path", "moe_tiny", "--json", "/"], "json / is a folder"),
        (["--model_name_or_path", "moe_tiny", "--device", "CPU", "--lora_r", "0"], "lora_r is 0"),
    ],
)
def test_mistakes_of_a_plan(flags, message, moe, place):
    places = {"MOE": place / "moe", "DENSE": place / "dense"}
    code, _, complaint = moe("plan", *(places.get(flag, flag) for flag in flags))
    assert code == 2
    (line,) = [line for line in complaint.splitlines() if line.startswith("moe plan: ")]
    assert message in line


FAST = ["--device", "CPU", "--sequence_length", 8, "--batch_size", 2]


def test_a_plan_of_any_model_as_tables_and_as_json(moe, place):
    for name in ("mixtral", "dense"):
        code, printed, _ = moe(
            "plan",
            "--model_name_or_path",
            place / name,
            *FAST,
            "--train",
            "lora",
            "qlora",
            "--json",
            place / "plan.json",
        )
        assert code == 0
        plan = json.loads((place / "plan.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(place / name)
        assert plan["sizes"]["total"] == model.num_parameters()
        assert f"{plan['sizes']['active']:,}" in printed
        assert "on disk" in printed
        assert "assumed" in printed
        methods = ["lora", "qlora"] if name == "mixtral" else ["lora"]
        assert [training["method"] for training in plan["training"]] == methods
        assert ("not planned: train qlora: a model without matrices of experts" in printed) == (name == "dense")
        memory = plan["training"][0]["memory"]
        assert memory["total"] == sum(value for part, value in memory.items() if part != "total")
    code, printed, _ = moe("plan", "--model_name_or_path", "moe_tiny", *FAST, "--train", "router", "--json", "-")
    assert json.loads(printed)["inference"]["cache"] == 2 * 8 * 3 * 2 * 2 * 16 * 4


def test_a_plan_fits_into_80_columns_and_prints_nothing_else(moe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, complaint = moe("plan", "--model_name_or_path", "moe_tiny", *FAST, "--recompute", "none", "layers")
    assert code == 0
    assert "…" not in printed.replace("https", "")
    assert printed.count("tokens per") == 3
    assert "LoRA trains" not in complaint
    assert "deprecated" not in complaint


def test_a_plan_says_what_to_change_where_nothing_fits(moe):
    flags = ["--model_name_or_path", "moe_tiny", *FAST, "--train", "full", "--device_memory", 0.002]
    code, printed, _ = moe("plan", *flags, "--fsdp_size", 2, "--ep_size", 2)
    assert code == 0
    assert "training, full, recompute none does not fit: change" in printed
    assert "--dtype bfloat16" in printed
    assert "all-to-all of tokens (EP)" in printed


def test_a_plan_refuses_headers_of_another_model(moe, place):
    config = json.loads((place / "mixtral" / "config.json").read_text())
    for fields, message in (
        ({"num_hidden_layers": 4}, "parameters where config.json asks for"),
        ({"vocab_size": 200}, "of shape (300, 32) where config.json asks for (200, 32)"),
    ):
        (place / "mixtral" / "config.json").write_text(json.dumps(config | fields))
        code, _, complaint = moe("plan", "--model_name_or_path", place / "mixtral", *FAST)
        assert code == 2
        assert message in complaint


def test_a_plan_refuses_a_configuration_of_another_kind(moe, tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        code, _, complaint = moe("plan", "--model_name_or_path", name, *FAST)
        assert code == 2
        assert "'vit'" in complaint
    (tmp_path / "other.json").write_text("{")
    code, _, complaint = moe("plan", "--model_name_or_path", tmp_path / "other.json", *FAST)
    assert code == 2
    assert f"the configuration of {tmp_path / 'other.json'} cannot be loaded" in complaint


def test_kimi_k2_is_planned_as_its_family(moe, tmp_path):
    config = DeepseekV3Config(**SHAPE | LATENT)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    file = tmp_path / "config.json"
    code, printed, _ = moe("plan", "--model_name_or_path", file, *FAST, "--train", "router", "--json", "-")
    assert code == 0
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).num_parameters()
    assert json.loads(printed)["sizes"]["total"] == expected


def test_verification_of_a_dry_run_is_refused(moe, place):
    flags = ["--model_name_or_path", place / "dense", "--output_dir", place / "up", "--dry_run", "--verify"]
    code, _, complaint = moe("upcycle", *flags)
    assert code == 2
    assert "verify compares the result, and dry_run makes none" in complaint


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
