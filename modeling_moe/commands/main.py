# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lists the commands of `moe` and runs one of them.

It imports the standard library alone, and a command only to run it, because torch and transformers take seconds to import.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `moe`.

    Attributes:
        module: name of the module in this folder.
        summary: what the command does, for `moe --help`.
        on_interrupt: how to go on after Ctrl-C, unless the command says so itself.
    """

    module: str
    summary: str
    on_interrupt: str = "start the command again, nothing was kept"


COMMANDS = {
    "upcycle": Command("upcycle", "turn dense checkpoints into a Mixture of Experts with the same function"),
    "plan": Command("plan", "print size and memory of an upcycled model before any weight is downloaded"),
    "convert": Command("convert", "write a checkpoint of one family in the format of another"),
    "resize": Command("resize", "give a Mixture of Experts more experts, or fewer"),
    "finetune": Command(
        "finetune",
        "train a model: all weights, routers, attention, or LoRA",
        "the same flags with --resume_from_checkpoint true go on after the last checkpoint, if there is one",
    ),
    "merge_adapter": Command("merge_adapter", "merge a LoRA adapter into its base model"),
    "eval": Command("evaluate", "measure loss, perplexity, bits per byte and balance on texts"),
    "report": Command("report", "show how evenly each layer of any MoE uses its experts"),
    "generate": Command("generate", "continue texts, or chat"),
    "push": Command(
        "push",
        "check a saved model or adapter and upload it to the Hub",
        "nothing was uploaded if no file list was printed; start the command again",
    ),
    "presets": Command("presets", "list the model configurations and recipes that the package brings"),
    "benchmark": Command("benchmark", "measure speed and memory of the experts against transformers' own"),
    "env": Command("env", "print versions, devices and back ends for a bug report"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moe COMMAND [RECIPE] [--FLAG VALUE ...]",
            "",
            *lines,
            "",
            "`moe COMMAND --help` describes a command and gives examples.",
        ]
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = f": did you mean {close[0]!r}?" if close else ""
    return f"moe: {name!r} is no command{meant} (see moe --help)"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `moe`.

    Args:
        argv: name of the command and its arguments; `sys.argv[1:]` by default.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_help())
        return
    if name not in COMMANDS:
        print(_unknown(name), file=sys.stderr)
        sys.exit(2)
    run_command(name, [f"moe {name}", *arguments])


def run_command(name: str, argv: Sequence[str]) -> None:
    """Runs one command; it exits with code 2 after a mistake and with 130 after Ctrl-C.

    Args:
        name: key of `COMMANDS`.
        argv: takes the place of `sys.argv`: the program's name, which messages begin with, and the arguments.
    """
    command = COMMANDS[name]
    sys.argv = list(argv)

    def imported_main() -> None:
        importlib.import_module(f"modeling_moe.commands.{command.module}").main()

    try:
        from modeling_moe.utils.command_line import run
    except KeyboardInterrupt:
        sys.exit(130)
    run(imported_main, command.on_interrupt)
