# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""scripts/finetune.py makes a new model from a configuration file and a tokenizer, and trains it."""
# ruff: noqa: F401 (fixtures)

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed


ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configuration" / "models" / "moe_tiny.json"


def finetune(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "scripts" / "finetune.py"), run_name="__main__")


@pytest.fixture
def flags(text_file, tokenizer, tmp_path):
    """Returns the recipe pretrain, with the flags that it needs and small sizes."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = ROOT / "configuration" / "recipes" / "pretrain.yaml"
    paths = ["--tokenizer_name", tmp_path / "tokenizer", "--data", f"wiki={text_file}"]
    small = (
        "--max_length 32 --use_cpu --disable_tqdm true --per_device_train_batch_size 4 --gradient_accumulation_steps 1"
    )
    return [recipe, "--model_name_or_path", PRESET, *paths, *small.split()]


def log(output: Path, step: int) -> list[dict]:
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def test_a_preset_is_trained_with_a_given_tokenizer(flags, tmp_path, monkeypatch):
    steps = ["--max_steps", 12, "--save_steps", 6, "--logging_steps", 1]
    finetune(monkeypatch, *flags, *steps, "--output_dir", tmp_path / "out")
    losses = [row["loss"] for row in log(tmp_path / "out", 12)]
    # a new model predicts all tokens alike, and the router losses are small
    assert losses[0] == pytest.approx(math.log(300), abs=0.2)
    assert losses[-1] < losses[0] - 0.5
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (300, 0, 1, 2)
    assert config.num_experts == 8
    assert config.use_cache
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 2

    # a second run and a resumed one end with equal weights, because the seed alone makes the first weights
    finetune(monkeypatch, *flags, *steps, "--output_dir", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for file in (tmp_path / "again").glob("*.safetensors"):
        file.unlink()
    for file in (tmp_path / "again" / "checkpoint-12").iterdir():
        file.unlink()
    (tmp_path / "again" / "checkpoint-12").rmdir()
    finetune(monkeypatch, *flags, *steps, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", "true")
    third = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "lora"], "method must be full"),
        (["--freeze_experts", "0"], "method must be full"),
        (["--model_name_or_path", "nowhere.json"], "nowhere.json does not exist"),
        (["--model_name_or_path", "TOKENIZER/tokenizer.json"], "is not the configuration of a causal LM"),
    ],
)
def test_mistakes(more, message, flags, tmp_path, monkeypatch, capsys):
    more = [text.replace("TOKENIZER", str(tmp_path / "tokenizer")) for text in more]
    with pytest.raises(SystemExit) as stop:
        finetune(monkeypatch, *flags, "--output_dir", tmp_path / "out", *more)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_preset_without_a_tokenizer_is_refused(text_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune(
            monkeypatch, "--model_name_or_path", PRESET, "--data", f"a={text_file}", "--output_dir", tmp_path / "out"
        )
    assert stop.value.code == 2
    assert "tokenizer_name is missing" in capsys.readouterr().err
