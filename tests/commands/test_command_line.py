# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These tests cover recipes by name, boolean flags, choices, and the examples of --help."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import modeling_moe
from modeling_moe.commands.main import COMMANDS, main, run_command
from modeling_moe.utils.command_line import parse
from modeling_moe.utils.recipes import recipes


SCRIPTS = Path(__file__).parents[2] / "scripts"
# script -> command
WRAPPERS = {
    script.name: command[1]
    for script in sorted(SCRIPTS.glob("*.py"))
    if (command := re.search(r'run_command\("(\w+)"', script.read_text()))
}


@dataclass
class Arguments:
    """Flags of several types."""

    method: str = "full"
    lora_r: int = 4
    size: Literal["small", "large"] = field(default="small", metadata={"help": "size"})
    steps: int = field(default=1, metadata={"help": "steps", "choices": (1, 2)})
    chat: bool | None = field(default=None, metadata={"help": "chat"})


def test_a_recipe_is_found_by_name(tmp_path, monkeypatch):
    for name, file in recipes().items():
        assert file.stem == name
    monkeypatch.setattr("modeling_moe.utils.command_line.recipes", lambda: {"small": tmp_path / "small.yaml"})
    (tmp_path / "small.yaml").write_text("method: lora\nlora_r: 8\n")
    (args,) = parse([Arguments], "Doc.", ["small", "--lora_r", "2"])
    assert (args.method, args.lora_r) == ("lora", 2)
    # a file of that name wins, and needs no ending
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").write_text("lora_r: 16\n")
    (args,) = parse([Arguments], "Doc.", ["small"])
    assert (args.method, args.lora_r) == ("full", 16)


@pytest.mark.parametrize(
    ("name", "message"), [("smal", "is no file and none of the recipes demo, "), ("x.yaml", "does not exist")]
)
def test_a_recipe_that_there_is_not(name, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([Arguments], "Doc.", [name])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("argv", "chat"), [([], None), (["--chat"], True), (["--chat", "true"], True), (["--chat", "false"], False)]
)
def test_a_boolean_flag_alone_is_true_whatever_the_default(argv, chat):
    """`--chat` alone was an error, since the default of None is neither true nor false."""
    (args,) = parse([Arguments], "Doc.", argv)
    assert args.chat is chat


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "huge"], "size 'huge' is unknown: it must be one of small, large"),
        (["--steps", "3"], "steps 3 is unknown: it must be one of 1, 2"),
    ],
)
def test_choices_are_named_by_a_refusal_and_by_help(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([Arguments], "Doc.", argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([Arguments], "Doc.", ["--help"])
    assert "--size {small,large}" in capsys.readouterr().out


def help_of(capsys, run, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def examples(text: str) -> list[str]:
    return re.findall(r"(?m)^    (\S.*)$", text.partition("options:")[0])


def test_the_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"modeling_moe {modeling_moe.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples_of_the_command(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moe"])
    text = help_of(capsys, main, [name, "--help"])
    assert text.startswith(f"usage: moe {name} [RECIPE] [--FLAG VALUE ...]\n")
    assert examples(text)[0].startswith(f"moe {name}")
    assert "scripts/" not in text.replace("python scripts/benchmark.py", "")
    assert not any("  " in line.strip() for line in examples(text))  # a lost backslash joins two lines
    assert max(map(len, text.partition("options:")[0].splitlines())) <= 130


@pytest.mark.parametrize("script", WRAPPERS)
def test_help_of_a_script_has_examples_of_the_script(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    text = help_of(capsys, run_command, WRAPPERS[script], [f"scripts/{script}", "--help"])
    assert text.startswith(f"usage: {script} [RECIPE] [--FLAG VALUE ...]\n")
    lines = examples(text)
    assert lines[0].startswith(f"python scripts/{script} ")
    assert not any(line.startswith("moe ") or "-m modeling_moe" in line for line in lines)
    assert f"`python scripts/{script} --help`" in (SCRIPTS / script).read_text()


def test_scripts_of_commands_are_these():
    assert {
        f"{name}.py": name
        for name in sorted(
            {"benchmark", "convert", "export_adapter", "finetune", "generate", "merge_adapter", "resize", "upcycle"}
        )
    } | {"eval_lm.py": "eval", "push_to_hub.py": "push", "router_report.py": "report"} == WRAPPERS


def test_ctrl_c_says_how_a_command_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moe"])

    def stop(argv=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_moe.commands.finetune.main", stop)
    with pytest.raises(SystemExit) as error:
        main(["finetune"])
    assert error.value.code == 130
    assert capsys.readouterr().err.startswith(
        "moe finetune: stopped: the same flags with --resume_from_checkpoint true"
    )


def test_ctrl_c_during_the_imports_is_one_line_too():
    """numpy turns a KeyboardInterrupt during its import into an ImportError; the finder below does so at any speed."""
    program = """
import os, signal, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                raise ImportError("numpy is broken")
sys.meta_path.insert(0, Finder())
sys.path.insert(0, sys.argv.pop(1))
import moe_command
moe_command.main()
"""
    result = subprocess.run(
        [sys.executable, "-c", program, SCRIPTS, "resize", "--help"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        130,
        "",
        "moe resize: stopped: start the command again, nothing was kept\n",
    )


def test_the_library_does_not_import_its_commands():
    """scripts use commands, commands use sub-packages, and sub-packages use the core; nothing points back."""
    package = SCRIPTS.parent / "modeling_moe"
    pointing = re.compile(
        r"(?m)^\s*(?:from|import) (?:\.+|modeling_moe\.)commands\b|^\s*(?:from|import) (?:moe_benchmark|moe_command)\b"
    )
    found = {
        file.relative_to(package).as_posix() for file in package.rglob("*.py") if pointing.search(file.read_text())
    }
    assert found == {"__main__.py", "commands/benchmark.py"}
