# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lists the commands of `moe` and runs one of them.

It imports the standard library alone, and a command only to run it, because torch and transformers take seconds to import.
"""

import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    "plan": Command(
        "plan", "print parameters, memory and time of any model on a device before any weight is downloaded"
    ),
    "convert": Command("convert", "write a checkpoint of one family in the format of another"),
    "resize": Command("resize", "give a Mixture of Experts more experts, or fewer"),
    "finetune": Command(
        "finetune",
        "train a model: all weights, routers, attention, or LoRA",
        "the same flags with --resume_from_checkpoint true go on after the last checkpoint, if there is one",
    ),
    "merge_adapter": Command("merge_adapter", "merge a LoRA adapter into its base model"),
    "export_adapter": Command("export_adapter", "write a LoRA adapter for vLLM, SGLang or llama.cpp"),
    "eval": Command("evaluate", "measure loss, perplexity, bits per byte and balance on texts"),
    "report": Command("report", "show the routing of any MoE by layer and domain, as a table and a page"),
    "generate": Command("generate", "continue texts"),
    "chat": Command("chat", "answer in a chat", "start the command again; it keeps no conversation"),
    "serve": Command("serve", "answer clients of the OpenAI API", "start the command again; it keeps nothing"),
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
            "`moe COMMAND --help` describes a command and gives examples; `moe --version` prints the version.",
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
    if name == "--version":
        from modeling_moe.compatibility import __version__

        print(f"modeling_moe {__version__}")
        return
    if name not in COMMANDS:
        print(_unknown(name), file=sys.stderr)
        sys.exit(2)
    run_command(name, [f"moe {name}", *arguments])


@contextmanager
def _ctrl_c_ends_the_process(message: str) -> Iterator[None]:
    """Prints a line and exits with code 130 at Ctrl-C inside the block.

    An exception would not do, because modules such as numpy turn a KeyboardInterrupt during their import into an ImportError.
    """

    def end(*_: object) -> None:
        os.write(2, f"{message}\n".encode())
        os._exit(130)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(name: str, argv: Sequence[str]) -> None:
    """Runs one command; it exits with code 2 after a mistake and with 130 after Ctrl-C.

    Args:
        name: key of `COMMANDS`.
        argv: takes the place of `sys.argv`: the program's name, which messages begin with, and the arguments.
    """
    command = COMMANDS[name]
    sys.argv = list(argv)

    program = os.path.basename(sys.argv[0])
    with _ctrl_c_ends_the_process(f"{program}: stopped: {command.on_interrupt}"):
        from modeling_moe.utils.command_line import run

        module = importlib.import_module(f"modeling_moe.commands.{command.module}")
    run(module.main, command.on_interrupt)
