# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command lists the model configurations and recipes that the package brings.

    moe presets
    moe presets --show olmoe_1b_7b > config.json
    accelerate launch --config_file "$(moe presets --folder)/accelerate/ddp.yaml" -m modeling_moe finetune sft_lora ...

A configuration makes a new model: `moe finetune pretrain --model_name_or_path moe_tiny`, or in Python
MoEConfig.from_preset("moe_tiny"). A recipe is the first argument of a command: `moe finetune sft_lora`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..configuration_moe import MoEConfig
from ..utils.command_line import parse
from ..utils.errors import UserError
from ..utils.presets import presets
from ..utils.recipes import CONFIGURATION, recipes


@dataclass
class PresetsArguments:
    """What to print instead of the two lists."""

    show: str | None = field(
        default=None, metadata={"help": "name of a configuration or recipe whose file is printed"}
    )
    folder: bool = field(default=False, metadata={"help": "print the folder of configurations and recipes"})

    def __post_init__(self):
        if self.show is not None and self.folder:
            raise UserError("show prints one file and folder the place of all: leave one of them out")


def _purpose(recipe: Path) -> str:
    """Returns the first sentence of the comment that a recipe begins with."""
    comment = re.match(r"(#.*\n)*", recipe.read_text(encoding="utf-8"))
    text = " ".join((comment[0] if comment else "").replace("#", " ").split())
    return re.split(r"[.:]\s", text)[0].rstrip(".")


def show(name: str) -> str:
    """Returns the file of a configuration or recipe as text.

    Raises:
        UserError: lists the names if there is no such name.
    """
    known = presets() | recipes()
    if name not in known:
        raise UserError(f"show {name!r} is unknown: it must be one of {', '.join(known)}")
    return known[name].read_text(encoding="utf-8")


def _rounded(count: int) -> str:
    unit, name = next(((unit, name) for unit, name in ((10**9, "B"), (10**6, "M")) if count >= unit), (10**3, "K"))
    return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"


def print_lists() -> None:
    """Prints a table of the configurations and a table of the recipes."""
    models = Table("configuration", "router", "layers", "experts, per token", "parameters", "active per token")
    for name, file in presets().items():
        config = MoEConfig.from_pretrained(str(file))
        models.add_row(
            name,
            str(config.router_type),
            str(config.num_hidden_layers),
            f"{config.num_experts}, {config.num_experts_per_tok}",
            _rounded(config.num_params()),
            _rounded(config.num_active_params()),
        )
    tables = Table("recipe", "purpose")
    for name, file in recipes().items():
        tables.add_row(name, _purpose(file))
    Console().print(models)
    Console().print(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the lists, one file, or the folder."""
    (args,) = parse([PresetsArguments], __doc__, argv)
    if args.folder:
        print(CONFIGURATION)
    elif args.show is not None:
        print(show(args.show), end="")
    else:
        print_lists()
