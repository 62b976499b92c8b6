# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What every script shares: arguments from flags or a recipe, and mistakes answered in one line."""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser


class UserError(ValueError):
    """A mistake in what the user gave; the message is one sentence that names it and the remedy."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


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
    parser = _Parser(dataclass_types, description=doc, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    if argv and argv[0].endswith((".yaml", ".yml")):
        try:
            argv = _recipe_flags(Path(argv[0])) + argv[1:]
        except (UserError, OSError) as error:
            parser.error(str(error))
    try:
        return parser.parse_args_into_dataclasses(args=argv)
    except ValueError as error:
        parser.error(_one_line(error))


def _recipe_flags(recipe: Path) -> list[str]:
    try:
        values = yaml.safe_load(recipe.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{recipe} is not YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{recipe} is not a recipe: it must hold one 'flag: value' a line")
    flags = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        items = [json.dumps(item) if isinstance(item, dict) else str(item) for item in items if item is not None]
        flags += [f"--{name}", *items] if items else []
    return flags


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a [`UserError`], ValueError or OSError becomes one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"{Path(sys.argv[0]).name}: {_one_line(error)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
