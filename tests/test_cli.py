# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Mistakes and Ctrl-C end a command in one line, mistyped flags get suggestions, and --help shows defaults."""

import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import TrainingArguments

from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import Interrupted, UserError


SCRIPTS = Path(__file__).parents[1] / "scripts"


@dataclass
class Arguments:
    """These flags belong to a command of this package."""

    name: str = field(metadata={"help": "a name"})
    num_experts: int = field(default=8, metadata={"help": "experts"})
    layers: list[str] = field(default_factory=list, metadata={"help": "layers"})
    note: str | None = field(default=None, metadata={"help": "a note"})
    keep: bool = field(default=True, metadata={"help": "keep it"})


@dataclass
class Training(TrainingArguments):
    """These flags are transformers' and one of this package's."""

    logging_steps: float = field(default=10, metadata={"help": "steps between two log lines"})


def complaint(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse([Arguments], "Doc.", argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("flag", ["--num_expert", "--num-expert", "--num_expert=4"])
def test_a_mistyped_flag_is_answered_by_what_was_meant(flag, capsys):
    """The message names the mistyped flag and the nearest one."""
    assert "'num_experts'" in complaint([flag, "4"], capsys)


def test_a_mistyped_key_of_a_recipe_is_answered_by_what_was_meant(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nnum_expert: 4\n")
    assert "'num_expert' is no flag of this command: did you mean 'num_experts'?" in complaint([str(recipe)], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"- 1\n", "is not a recipe"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"[" * 10_000, "is not YAML"),
    ],
    ids=["missing", "list", "broken", "no text", "deep"],
)
def test_a_recipe_that_cannot_be_read_is_answered_in_one_line(tmp_path, content, message, capsys):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_bytes(content)
    assert message in complaint([str(recipe)], capsys)


def test_an_argument_without_a_flag_is_named(capsys):
    assert "argument 'stray' belongs to no flag" in complaint(["--name", "x", "stray"], capsys)


def test_a_value_in_a_recipe_may_begin_with_hyphens(tmp_path):
    """A recipe's value that begins with hyphens is not read as a flag."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: --odd\nnum_experts: -1\nlayers: [a, b]\nnote: null\nkeep: false\n")
    (args,) = parse([Arguments], "Doc.", [str(recipe), "--num_experts", "3"])
    assert (args.name, args.num_experts, args.layers, args.note, args.keep) == ("--odd", 3, ["a", "b"], None, False)


def test_help_shows_defaults_and_what_a_negative_flag_does(capsys):
    with pytest.raises(SystemExit):
        parse([Arguments], "Doc.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "experts (default: 8)" in text
    assert "keep it (default: True)" in text
    assert "--no_keep sets --keep false" in text
    assert "(default: None)" not in text
    assert "(default: [])" not in text
    assert "--num-experts" not in text
    assert (parse([Arguments], "Doc.", ["--name", "x", "--no_keep"])[0]).keep is False


def test_help_lists_flags_of_ours_before_those_of_transformers(capsys):
    with pytest.raises(SystemExit):
        parse([Training, Arguments], "Doc.", ["--help"])
    text = capsys.readouterr().out
    ours, theirs = text.split("arguments of transformers' Trainer:")
    assert all(f"  --{name} " in ours for name in ("logging_steps", "num_experts", "name"))
    assert "  --learning_rate " in theirs
    assert "  --learning_rate " not in ours


def outcome(error: BaseException, capsys, **options) -> tuple[int | str | None, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, **options)
    return stop.value.code, capsys.readouterr().err


def test_ctrl_c_is_one_line_that_says_how_to_go_on(monkeypatch, capsys):
    """Ctrl-C prints one line and ends with exit code 130."""
    monkeypatch.setattr(sys, "argv", ["command.py"])
    assert outcome(KeyboardInterrupt(), capsys, on_interrupt="do it again") == (
        130,
        "command.py: stopped: do it again\n",
    )
    assert outcome(Interrupted("add --resume"), capsys, on_interrupt="no") == (
        130,
        "command.py: stopped: add --resume\n",
    )
    code, text = outcome(KeyboardInterrupt(), capsys)
    assert code == 130
    assert "start the command again" in text


def test_a_mistake_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command.py"])
    assert outcome(UserError("wrong\n  indeed"), capsys) == (2, "command.py: wrong indeed\n")
    missing = FileNotFoundError(2, "No such file or directory", "x.json")
    assert outcome(missing, capsys) == (2, "command.py: x.json: No such file or directory\n")
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 / 0))


@pytest.mark.parametrize(
    "name", ["convert", "export_adapter", "generate", "merge_adapter", "push_to_hub", "resize", "upcycle"]
)
def test_a_typo_in_a_script_is_one_line_and_exit_code_2(name, monkeypatch, capsys):
    """A typo prints one line, without a traceback, and ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--chot"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch(rf"{name}.py: 'chot' is no flag of this command.*\n", capsys.readouterr().err)
