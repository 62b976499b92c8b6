# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What every script shares: arguments from flags or a recipe, and mistakes and Ctrl-C answered in one line."""

import difflib
import json
import logging
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, dynamic_module_utils

from .errors import Interrupted, UserError


# PEFT imports bitsandbytes, which warns at once of a package of kernels that quantized linear layers on a CPU could use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The help keeps the lines of the description, and shows each default that says something."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None or action.default in ([], "", SUPPRESS):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        named = [option for option in action.option_strings if "-" not in option[2:]]
        if not named or action.nargs == 0:
            return ", ".join(named) or super()._format_action_invocation(action)
        return f"{named[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class _Parser(HfArgumentParser):
    def __init__(self, dataclass_types: Sequence[type], doc: str | None):
        super().__init__(
            dataclass_types,
            description=doc,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            usage="%(prog)s [RECIPE.yaml] [--FLAG VALUE ...]",
        )
        inherited = set().union(*map(_of_transformers, dataclass_types))
        group = self.add_argument_group("arguments of transformers' Trainer") if inherited else None
        for action in list(self._optionals._group_actions):
            if any(option.startswith("--no_") for option in action.option_strings) and action.nargs == 0:
                action.help, action.default = f"sets --{action.dest} false", SUPPRESS
            if group is not None and action.dest in inherited:
                self._optionals._group_actions.remove(action)
                group._group_actions.append(action)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def refuse_unknown(self, argv: Sequence[str]) -> None:
        """Ends the program with one line if a flag is unknown, before argparse complains of what is missing without it."""
        flags = [
            text.partition("=")[0] for text in argv if text.startswith("--") and " " not in text.partition("=")[0]
        ]
        for flag in flags:
            if flag != "--" and flag not in self._option_string_actions:
                known = [option for option in self._option_string_actions if "-" not in option[2:]]
                close = difflib.get_close_matches(
                    flag.replace("-", "_"), [name.replace("-", "_") for name in known], n=1
                )
                meant = f": did you mean {close[0].strip('_')!r}?" if close else ""
                self.error(f"{flag.removeprefix('--')!r} is no flag of this command{meant}")


def _of_transformers(dataclass_type: type) -> set[str]:
    """Names of the fields that a dataclass of ours has from one of transformers' and does not declare anew."""
    bases = [base for base in dataclass_type.__mro__ if base.__module__.startswith("transformers.")]
    return {field.name for base in bases for field in fields(base)} - set(dataclass_type.__annotations__)


def parse(dataclass_types: Sequence[type], doc: str | None, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Reads a script's arguments.

    Args:
        dataclass_types: the argument groups, as [`~transformers.HfArgumentParser`] takes them.
        doc: text of `--help`, examples included.
        argv: the command line without the program; `sys.argv[1:]` if not given. A first argument that ends in `.yaml`
            is a recipe whose keys are the flags; flags after it win.

    Returns:
        One instance for each dataclass. On a bad argument it prints one line and exits with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, doc)
    try:
        if argv and argv[0].endswith((".yaml", ".yml")):
            argv = _recipe_flags(Path(argv[0])) + argv[1:]
        parser.refuse_unknown(argv)
        *groups, unknown = parser.parse_args_into_dataclasses(
            args=argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, OSError) as error:
        parser.error(_one_line(error))
    if unknown:
        parser.error(f"argument {unknown[0]!r} belongs to no flag: write --FLAG before it; a recipe comes first")
    return tuple(groups)


def _recipe_flags(recipe: Path) -> list[str]:
    if not recipe.is_file():
        raise UserError(f"the recipe {recipe} does not exist")
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{recipe} is not YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{recipe} is not a recipe: it must hold one 'flag: value' a line")
    arguments = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        items = [json.dumps(item) if isinstance(item, dict) else str(item) for item in items if item is not None]
        # a single value that begins with -- is a value none the less
        arguments += [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *items] if items else []
    return arguments


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def run(main: Callable[[], None], on_interrupt: str = "start the command again, nothing was kept") -> None:
    """Runs a script's `main`.

    A [`UserError`], ValueError or OSError becomes one line on stderr and exit code 2; Ctrl-C one line and exit code 130.

    Args:
        main: parses the command line and does the work.
        on_interrupt: how to go on after Ctrl-C, one sentence; that of an [`Interrupted`] is printed in place of it.
    """
    # transformers then never asks on standard input whether a checkpoint's code may run
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    program = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"{program}: {_one_line(error)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt as stop:
        how = str(stop) if isinstance(stop, Interrupted) and str(stop) else on_interrupt
        print(f"{program}: stopped: {how}", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(130)
