# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""scripts/generate.py runs a checkpoint by the code of the package, and answers a mistake in one line."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config, train_tokenizer


SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("generate") / "model", train_tokenizer()
    MoEForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def generate(monkeypatch, capsys):
    """Runs the script in this process; returns exit code, standard output and the lines of its complaints."""

    def run_script(*flags):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        output, errors = capsys.readouterr()
        return code, output, [line for line in errors.splitlines() if line.startswith("generate.py: ")]

    return run_script


def expected_text(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer, model = train_tokenizer(), MoEForCausalLM.from_pretrained(folder).eval()
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("code", ["as saved", "of somebody else", "none"])
def test_the_package_runs_a_checkpoint_whatever_code_is_saved_with_it(generate, saved, tmp_path, code):
    """An earlier version ran the code of the checkpoint without asking."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    if code == "of somebody else":
        (folder / "modeling_moe.py").write_text("raise AssertionError('the code of the checkpoint ran')")
    for file in folder.glob("*.py") if code == "none" else ():
        file.unlink()
    status, output, errors = generate("--model_name_or_path", folder, "--prompt", "a b", "--max_new_tokens", 4)
    assert (status, errors) == (0, [])
    assert output == f"{expected_text(saved, 'a b', 4)}\n\n"


def test_an_adapter_runs_on_its_base(generate, saved, tmp_path):
    adapted = get_peft_model(MoEForCausalLM.from_pretrained(saved), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    status, output, _ = generate(
        "--model_name_or_path", tmp_path / "adapter", "--prompt", "a b", "--max_new_tokens", 4
    )
    assert status == 0
    # a new adapter adds 0 to every layer
    assert output == f"{expected_text(saved, 'a b', 4)}\n\n"


def test_mistakes_are_one_line(generate, saved, tmp_path):
    """In an earlier version a typo, damaged weights and a tokenizer that is too large ended in tracebacks."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    prompt = ("--prompt", "a")
    cases = {
        "'chot' is no flag": ("--model_name_or_path", folder, *prompt, "--chot"),
        "prompt is missing": ("--model_name_or_path", folder),
        "there is no such folder": ("--model_name_or_path", tmp_path / "nope", *prompt),
        "max_new_tokens is 0": ("--model_name_or_path", folder, *prompt, "--max_new_tokens", 0),
    }
    for message, flags in cases.items():
        status, _, errors = generate(*flags)
        assert (status, len(errors)) == (2, 1)
        assert message in errors[0]
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    status, _, errors = generate("--model_name_or_path", folder, *prompt)
    assert (status, len(errors)) == (2, 1)
    assert f"the tokenizer has {len(tokenizer)} tokens and the model {len(tokenizer) - 1}" in errors[0]
    (folder / "model.safetensors").write_bytes(b"garbage")
    status, _, errors = generate("--model_name_or_path", folder, *prompt)
    assert (status, len(errors)) == (2, 1)
    assert "SafetensorError" in errors[0]
