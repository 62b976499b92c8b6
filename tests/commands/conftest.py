# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Fixtures: a command that runs in this process, and a folder with tiny models and a text."""

import sys

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, MixtralForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.commands.main import main
from tests.builders import SHAPE, sample_text, tiny_config, train_tokenizer


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
