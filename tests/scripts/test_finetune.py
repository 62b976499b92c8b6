"""scripts/finetune.py on a tiny model: it learns, and what it saves is what it trained."""
# ruff: noqa: F401, F811 (fixtures)

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_moe.hub import check_without_package
from tests.training.conftest import checkpoint, text_file, tiny_model, tokenizer


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configuration" / "recipes"


def finetune(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "scripts" / "finetune.py"), run_name="__main__")


def small(checkpoint, text_file, output_dir, steps=12):
    flags = f"--max_length 32 --max_steps {steps} --learning_rate 1e-2 --use_cpu --disable_tqdm true"
    flags += " --gradient_accumulation_steps 2 --save_strategy steps --save_steps 6"
    paths = ["--model_name_or_path", checkpoint, "--data", f"wiki={text_file}", "--output_dir", output_dir]
    return [*paths, *flags.split()]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 40)[None]).logits


def held_out_loss(output: str) -> float:
    (line,) = [line for line in output.splitlines() if "held-out loss, wiki" in line]
    return float(line.split("│")[2])


def test_full(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    finetune(monkeypatch, RECIPES / "sft_full.yaml", *small(checkpoint, text_file, output))
    assert held_out_loss(capsys.readouterr().out) < 5.0
    saved = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits(saved), logits(AutoModelForCausalLM.from_pretrained(output / "checkpoint-12")))
    assert not torch.allclose(logits(saved), logits(tiny_model()))
    assert len(AutoTokenizer.from_pretrained(output)) == 300
    assert not (output / ".partial").exists()


def test_merged_lora_is_the_adapter_on_its_base(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    finetune(monkeypatch, RECIPES / "sft_lora.yaml", *small(checkpoint, text_file, output))
    assert held_out_loss(capsys.readouterr().out) < 5.5
    saved = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, output / "checkpoint-12")
    torch.testing.assert_close(logits(saved), logits(adapted), rtol=1e-4, atol=1e-4)
    changed = {name for name, parameter in saved.named_parameters() if not torch.equal(parameter, before[name])}
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
    assert {next((part for part in parts if part in name), name) for name in changed} == set(parts)
    assert not (output / "adapter_config.json").exists()


def test_adapter(checkpoint, text_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    flags = ["--method", "lora", "--merge_lora", "false", "--lora_experts", "false", "--lora_router", "false"]
    finetune(monkeypatch, *small(checkpoint, text_file, output), *flags)
    assert (output / "adapter_config.json").exists()
    assert not (output / "config.json").exists()
    adapted = AutoModelForCausalLM.from_pretrained(output)
    assert not torch.allclose(logits(adapted), logits(tiny_model()))
    assert all(
        "experts" not in name and "gate" not in name for name, _ in adapted.named_parameters() if "lora" in name
    )


def test_resumed_run_ends_where_a_whole_one_does(checkpoint, text_file, tmp_path, monkeypatch):
    flags = ["--method", "full", "--lr_scheduler_type", "constant", "--eval_fraction", "0"]
    finetune(monkeypatch, *small(checkpoint, text_file, tmp_path / "whole"), *flags)
    finetune(monkeypatch, *small(checkpoint, text_file, tmp_path / "parts", steps=6), *flags)
    finetune(
        monkeypatch, *small(checkpoint, text_file, tmp_path / "parts"), *flags, "--resume_from_checkpoint", "true"
    )
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    torch.testing.assert_close(logits(parts), logits(whole))


def test_same_seed_same_model(checkpoint, text_file, tmp_path, monkeypatch):
    for name in ("one", "two"):
        finetune(monkeypatch, *small(checkpoint, text_file, tmp_path / name, steps=2), "--method", "lora")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(logits(one), logits(two), rtol=0, atol=0)


def test_overwritten_adapter_leaves_nothing_behind(checkpoint, text_file, tmp_path, monkeypatch):
    output, lora = tmp_path / "out", ["--method", "lora", "--overwrite"]
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=1), *lora, "--merge_lora", "false")
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=1), *lora)
    assert not (output / "adapter_config.json").exists()
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]


def test_reloads_without_the_package(checkpoint, text_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=1), "--method", "lora")
    assert check_without_package(output) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "wiki"], "write domain=source"),
        (["--data", "wiki=missing.txt"], "missing.txt does not exist"),
        (["--method", "qlora"], "choose full or lora"),
        (["--eval_fraction", "1.5"], "eval_fraction is 1.5"),
        (["--max_length", "100000"], "lower it"),
        (["--method", "lora", "--lora_target_modules", "wqkv"], "lora_target_modules wqkv match no layer"),
        (["--resume_from_checkpoint", "true"], "holds no checkpoint"),
        (["--dtype", "float12"], "dtype 'float12' is unknown"),
        (["--learnin_rate", "1"], "learnin_rate"),
        (["--model_name_or_path", "/missing/model"], "/missing/model"),
    ],
)
def test_mistakes(flags, message, checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, *small(checkpoint, text_file, output), *flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


def test_unknown_recipe_key(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("methode: full\n")
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, recipe, *small(checkpoint, text_file, tmp_path / "out"))
    assert exit_info.value.code == 2
    assert "methode" in capsys.readouterr().err


def test_occupied_output_dir(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, *small(checkpoint, text_file, output))
    assert exit_info.value.code == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "ddp", "fsdp2"])
def test_accelerate_reads_its_configuration(name):
    path = ROOT / "configuration" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == (8 if name in ("ddp", "fsdp2") else 1)


@pytest.mark.slow
def test_two_processes(text_file, tokenizer, tmp_path):
    model, output = tiny_model(router_selection_bias=True, router_bias_update_rate=0.125), tmp_path / "out"
    model.save_pretrained(tmp_path / "biased")
    tokenizer.save_pretrained(tmp_path / "biased")
    config = ROOT / "configuration" / "accelerate" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--multi_gpu"]
    command += ["--num_processes", 2, "--main_process_port", 0, ROOT / "scripts" / "finetune.py", "--method", "lora"]
    command += small(tmp_path / "biased", text_file, output, steps=1)
    subprocess.run([str(part) for part in command], check=True)
    biases = [v for k, v in load_file(output / "model.safetensors").items() if k.endswith("e_score_correction_bias")]
    assert all((bias.abs() <= 0.125).all() and bias.any() for bias in biases)
    assert len(biases) == 2


def test_help_shows_examples(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, "--help")
    assert exit_info.value.code == 0
    assert "python scripts/finetune.py configuration/recipes/sft_lora.yaml" in capsys.readouterr().out
