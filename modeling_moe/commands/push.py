# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command uploads a saved model or LoRA adapter to the Hub: code, weights and card.

    moe push --model_name_or_path outputs/demo/model --repo_id you/my-moe --dry_run
    moe push --model_name_or_path outputs/demo/model --repo_id you/my-moe --private --license apache-2.0 \\
        --base_model HuggingFaceTB/SmolLM2-135M --scores outputs/demo/after.json --report outputs/demo/report

Log in first with `hf auth login`. Before the upload a process without this package loads the model by the saved code. The
files of the model are uploaded, and all other files in the folder are listed as left out. A folder without a card of yours
gets a card, which describes the model, its routers and how to load and serve it, and names the base model, license, data,
training and scores that the records in the folder know; the license must be known or given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..hub import Published, push_folder
from ..utils.command_line import parse
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.locations import local_folder


@dataclass
class PushArguments:
    """What to publish, and under which name."""

    model_name_or_path: str = field(metadata={"help": "folder of the saved model or adapter"})
    repo_id: str = field(metadata={"help": "owner/name on the Hub"})
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    dry_run: bool = field(default=False, metadata={"help": "check and list the files, upload and write nothing"})
    license: str | None = field(
        default=None, metadata={"help": "the Hub's identifier, such as apache-2.0; the recorded one if not given"}
    )
    language: list[str] | None = field(default=None, metadata={"help": "language codes such as en, for the card"})
    base_model: str | None = field(
        default=None, metadata={"help": "owner/name of the base model on the Hub; the recorded one if not given"}
    )
    scores: str | None = field(
        default=None, metadata={"help": "file that `moe eval --output_json` wrote, for the card"}
    )
    report: str | None = field(
        default=None, metadata={"help": "folder that `moe report --output_dir` wrote; the card shows its pictures"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run Python code that the checkpoint brings, and publish it"}
    )

    def __post_init__(self):
        if self.scores is not None and not Path(self.scores).is_file():
            raise UserError(f"scores {self.scores}: there is no such file")


def push(args: PushArguments) -> Published:
    """Checks a model or adapter, and uploads it unless `args.dry_run` is set.

    Raises:
        UserError: see [`~modeling_moe.hub.push_folder`].
    """
    return push_folder(
        local_folder(args.model_name_or_path),
        args.repo_id,
        args.private,
        args.dry_run,
        trust_remote_code=args.trust_remote_code,
        base_model=args.base_model,
        license=args.license,
        language=args.language,
        metrics=read_json(Path(args.scores)) if args.scores else None,
        report=args.report,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, uploads and lists the files."""
    (args,) = parse([PushArguments], __doc__, argv)
    published = push(args)
    table = Table("file", "bytes", title=f"{args.repo_id}{', nothing uploaded' if args.dry_run else ''}")
    for name, size in published.files.items():
        table.add_row(name, f"{size:,}")
    console = Console()
    console.print(table)
    if published.left_out:
        console.print(f"left out: {', '.join(published.left_out)}", soft_wrap=True, markup=False, highlight=False)
