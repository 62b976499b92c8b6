# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""`moe chat` survives Ctrl-C in an answer, and an error in the middle of a text ends both commands in one line."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling_moe.commands.main import run_command
from modeling_moe.modeling_moe import MoEForCausalLM
from tests.builders import save_llama, tiny_config, train_tokenizer
from tests.data.test_documents import PLAIN


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("chat") / "model", train_tokenizer()
    tokenizer.chat_template = PLAIN
    MoEForCausalLM(tiny_config(vocab_size=300, max_position_embeddings=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def moe(monkeypatch, capsys):
    """Runs a command in this process; returns exit code, standard output and standard error."""

    def run(command, *flags):
        monkeypatch.setattr(sys, "argv", sys.argv)  # which the command replaces
        capsys.readouterr()
        code = 0
        try:
            run_command(command, [f"moe {command}", *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


class Failing:
    """Lets a model raise an error in its third call, and in each third one after it."""

    def __init__(self, monkeypatch, error: BaseException):
        self.calls, self.error, forward = 0, error, MoEForCausalLM.forward

        def fail(model, *args, **kwargs):
            self.calls += 1
            if self.calls % 3 == 0:
                raise self.error
            return forward(model, *args, **kwargs)

        # generate looks into the signature of forward
        fail.__wrapped__ = forward
        monkeypatch.setattr(MoEForCausalLM, "forward", fail)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "model.safetensors"), ValueError("x changed")])
def test_an_error_in_the_middle_of_a_text_stands_on_its_own_line(error, moe, saved, monkeypatch):
    _, whole, _ = moe("generate", "--model_name_or_path", saved, "--prompt", "the old", "--max_new_tokens", 2)
    Failing(monkeypatch, error)
    code, output, errors = moe("generate", "--model_name_or_path", saved, "--prompt", "the old", "--max_new_tokens", 8)
    assert code == 2
    assert output == whole.removesuffix("\n")
    message = "model.safetensors: Input/output error" if isinstance(error, OSError) else "x changed"
    assert errors.splitlines()[-1] == f"moe generate: {message}"


def test_ctrl_c_ends_an_answer_at_the_terminal(moe, saved, monkeypatch):
    Failing(monkeypatch, KeyboardInterrupt())
    stdin = io.StringIO("the old\nmill\n")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    code, output, errors = moe("chat", "--model_name_or_path", saved, "--max_new_tokens", 8)
    assert code == 0
    assert output.count("assistant: ") == 2
    assert errors.count("2 new tokens in") == errors.count(", stopped by Ctrl-C") == 2


def test_ctrl_c_ends_a_command_that_nobody_types_into(moe, saved, monkeypatch):
    Failing(monkeypatch, KeyboardInterrupt())
    flags = ("--model_name_or_path", saved, "--prompt", "the old", "mill", "--max_new_tokens", 8)
    code, output, errors = moe("chat", *flags)
    assert (code, output.count("assistant: ")) == (130, 1)
    assert errors.splitlines()[-1] == "moe chat: stopped: start the command again; it keeps no conversation"


def test_a_chat_with_a_draft_writes_the_same_answers(moe, saved, tmp_path):
    draft = save_llama(tmp_path / "dense")
    flags = ("--model_name_or_path", saved, "--prompt", "the old", "mill", "--max_new_tokens", 8)
    _, expected, _ = moe("chat", *flags)
    code, output, errors = moe("chat", *flags, "--draft", draft, "--draft_tokens", 2)
    assert (code, output) == (0, expected)
    assert errors.count("tokens accepted per step of ") == 2
    assert "generation_config" not in errors  # transformers' advice about calls of its own
    code, _, errors = moe("chat", *flags, "--draft", draft, "--do_sample", "--temperature", 0.8)
    assert code == 0
    assert "custom logits processor" not in errors

    code, _, errors = moe("chat", *flags, "--draft", "auto")
    assert code == 2
    assert "has no conversion.json, which names the dense source" in errors.splitlines()[-1]


def test_a_draft_that_could_change_the_text_is_refused(moe, tmp_path):
    draft = save_llama(tmp_path / "dense")
    train_tokenizer().save_pretrained(tmp_path / "moe")
    config = tiny_config(vocab_size=300, router_type="expert_choice", allow_noncausal=True)
    MoEForCausalLM(config).save_pretrained(tmp_path / "moe")
    code, _, errors = moe("generate", "--model_name_or_path", tmp_path / "moe", "--prompt", "a", "--draft", draft)
    assert code == 2
    reason = "because router_type='expert_choice' chooses among the tokens of one call: leave draft out"
    assert errors.splitlines()[-1] == f"moe generate: draft {draft} could change the text, {reason}"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_budget_changes_no_text(command, moe, saved, tmp_path):
    flags = ("--model_name_or_path", saved, "--prompt", "the old", "mill", "--max_new_tokens", 8)
    _, expected, _ = moe(command, *flags)
    offloaded = (
        *flags,
        "--budget",
        "80KiB",
        "--expert_policy",
        "lru",
        "--expert_tier",
        "disk",
        "--expert_prefetch",
        0,
        "--stats",
    )
    code, output, errors = moe(command, *offloaded)
    assert (code, output) == (0, expected), errors
    lines = errors.splitlines()
    assert lines[-4].split()[:4] == ["layer", "hits", "misses", "hit"]
    assert [line.split()[0] for line in lines[-3:]] == [
        "model.layers.0.mlp.experts",
        "model.layers.2.mlp.experts",
        "total",
    ]

    draft = save_llama(tmp_path / "dense")
    code, output, errors = moe(command, *offloaded, "--draft", draft, "--draft_tokens", 2)
    assert (code, output) == (0, expected), errors


def test_bad_budgets_are_one_line(moe, saved, tmp_path):
    for flags, message in (
        (("--budget", "1KiB"), "one token needs 3"),
        (("--budget", "much"), "budget"),
        (("--budget", "1GiB", "--expert_prefetch", -1), "prefetch=-1 is no number of experts"),
    ):
        code, _, errors = moe("generate", "--model_name_or_path", saved, "--prompt", "a", *flags)
        assert code == 2
        assert message in errors.splitlines()[-1]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved)}))
    train_tokenizer().save_pretrained(tmp_path)
    code, _, errors = moe("generate", "--model_name_or_path", tmp_path, "--prompt", "a", "--budget", "1GiB")
    assert code == 2
    assert "is an adapter: merge it first by moe merge_adapter" in errors.splitlines()[-1]


def test_a_checkpoint_that_changes_under_the_run_ends_the_text(moe, saved, tmp_path, monkeypatch):
    """The second prompt finds another file than the one that was opened."""
    weights = saved / "model.safetensors"
    forward, calls = MoEForCausalLM.forward, []

    def touch(model, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.utime(weights, ns=(0, 0))
        return forward(model, *args, **kwargs)

    touch.__wrapped__ = forward
    monkeypatch.setattr(MoEForCausalLM, "forward", touch)
    flags = ("--model_name_or_path", saved, "--prompt", "the old", "--max_new_tokens", 30)
    code, output, errors = moe("generate", *flags, "--budget", "60KiB", "--expert_tier", "disk")
    assert code == 2
    assert output.startswith("the old")
    assert output.endswith("\n")
    assert (
        errors.splitlines()[-1]
        == f"moe generate: {weights} changed while the model was using it: load the model again"
    )


def read_until(terminal: int, text: str, seen: str = "", seconds: float = 120) -> str:
    """Reads from a terminal until a text comes; returns all that was read."""
    end = time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


@pytest.mark.slow
def test_a_real_terminal(saved):
    """Ctrl-C in an answer asks for the next turn, and Ctrl-D ends the chat with code 0."""
    terminal, inner = pty.openpty()
    command = [sys.executable, "-m", "modeling_moe", "chat", "--model_name_or_path", str(saved)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "480"],
        cwd=root,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    try:
        read_until(terminal, "user: ")
        os.write(terminal, b"the old\n")
        read_until(terminal, "assistant: ")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        seen = read_until(terminal, "stopped by Ctrl-C")
        read_until(terminal, "user: ", seen.partition("stopped by Ctrl-C")[2])
        os.write(terminal, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
