# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Every command reads its arguments from flags or a recipe, and answers a mistake or Ctrl-C in one line, by this module."""

import difflib
import json
import logging
import re
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, dynamic_module_utils
from transformers.hf_argparser import string_to_bool

from .errors import Interrupted, UserError
from .recipes import recipes


# PEFT imports bitsandbytes, which then warns of a missing package of kernels for quantised layers on a CPU
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

RECIPE_ENDINGS = (".yaml", ".yml")


def program() -> str:
    """Returns the name of the running command for messages, such as `moe upcycle` or `upcycle.py`."""
    return Path(sys.argv[0]).name


class _HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """This formatter keeps the lines of the description, and shows each default except None, `[]` and `""`."""

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
    def __init__(self, dataclass_types: Sequence[type], description: str | None):
        super().__init__(
            dataclass_types,
            prog=program(),
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            usage="%(prog)s [RECIPE] [--FLAG VALUE ...]",
        )
        inherited = set().union(*map(_fields_of_transformers, dataclass_types))
        group = self.add_argument_group("arguments of transformers' Trainer") if inherited else None
        for action in list(self._optionals._group_actions):
            if any(option.startswith("--no_") for option in action.option_strings) and action.nargs == 0:
                action.help, action.default = f"sets --{action.dest} false", SUPPRESS
            if action.type is string_to_bool and action.nargs is None:
                # transformers asks for a value where the default is None
                action.nargs, action.const = "?", True
            if group is not None and action.dest in inherited:
                self._optionals._group_actions.remove(action)
                group._group_actions.append(action)

    def _check_value(self, action: Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise ArgumentError(None, f"{action.dest} {value!r} is unknown: it must be one of {known}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def refuse_unknown(self, argv: Sequence[str]) -> None:
        """Exits with one line if a flag is unknown, before argparse complains about a missing required flag."""
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


def _fields_of_transformers(dataclass_type: type) -> set[str]:
    """Returns the names of the fields that a dataclass inherits from transformers and does not declare again."""
    bases = [base for base in dataclass_type.__mro__ if base.__module__.startswith("transformers.")]
    return {field.name for base in bases for field in fields(base)} - set(dataclass_type.__annotations__)


def _description(doc: str | None) -> str | None:
    """Returns the text of `--help`; where a script runs, its examples call the script instead of `moe COMMAND`."""
    if doc is None or not program().endswith(".py"):
        return doc
    script = f"scripts/{program()}"
    return re.sub(r"(?m)^    moe \w+", f"    python {script}", re.sub(r"-m modeling_moe \w+", script, doc))


def parse(dataclass_types: Sequence[type], doc: str | None, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Reads the arguments of a command.

    Args:
        dataclass_types: argument groups for [`~transformers.HfArgumentParser`].
        doc: text of `--help`. Lines of four spaces and `moe COMMAND` are examples.
        argv: command line without the program; `sys.argv[1:]` by default. The first argument may be a recipe, a path or
            the name of one in configuration/recipes. A recipe is a YAML file whose keys are flags; flags after it win.

    Returns:
        One instance of each dataclass. A bad argument prints one line and exits with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, _description(doc))
    try:
        if argv and not argv[0].startswith("-"):
            argv = _recipe_flags(_find_recipe(argv[0])) + argv[1:]
        parser.refuse_unknown(argv)
        *groups, unknown = parser.parse_args_into_dataclasses(
            args=argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, OSError) as error:
        parser.error(_one_line(error))
    if unknown:
        parser.error(f"argument {unknown[0]!r} belongs to no flag: write --FLAG before it; a recipe comes first")
    return tuple(groups)


def _find_recipe(name: str) -> Path:
    path, known = Path(name), recipes()
    if path.is_file() or name.endswith(RECIPE_ENDINGS):
        if not path.is_file():
            raise UserError(f"the recipe {name} does not exist")
        return path
    if name not in known:
        raise UserError(
            f"{name!r} is no file and none of the recipes {', '.join(known)}: write --FLAG before a value, or name a recipe"
        )
    return known[name]


def _recipe_flags(recipe: Path) -> list[str]:
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
        # argparse would take a value that begins with -- for a flag
        arguments += [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *items] if items else []
    return arguments


def refuse_missing_folder(**files: str | None) -> None:
    """Refuses a file to write whose folder does not exist, or that is a folder itself.

    Args:
        files: path of each file by the name of its flag; None for a file that is not asked for.

    Raises:
        UserError: names the flag and the folder.
    """
    for name, file in files.items():
        if file is not None and not Path(file).parent.is_dir():
            raise UserError(f"{name} {file}: make the folder {Path(file).parent} first")
        if file is not None and Path(file).is_dir():
            raise UserError(f"{name} {file} is a folder: give the name of a file in it")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def run(main: Callable[[], None], on_interrupt: str = "start the command again, nothing was kept") -> None:
    """Runs the `main` function of a command.

    A [`UserError`], ValueError or OSError becomes one line on stderr and exit code 2; Ctrl-C one line and exit code 130.

    Args:
        main: function that parses the command line and does the work.
        on_interrupt: one sentence that Ctrl-C prints: how to go on. The text of an [`Interrupted`] takes its place.
    """
    # transformers then never asks on standard input whether a checkpoint's code may run
    # pyrefly: ignore[bad-assignment]: the type checker takes the number in transformers for a constant
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        main()
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"{program()}: {_one_line(error)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt as stop:
        how = str(stop) if isinstance(stop, Interrupted) and str(stop) else on_interrupt
        print(f"{program()}: stopped: {how}", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(130)
