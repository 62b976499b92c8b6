#!/usr/bin/env python
"""Publish a saved model or LoRA adapter: code, weights and card, after a clean process has loaded it by that code alone.

    python scripts/push_to_hub.py --model_name_or_path outputs/demo/model --repo_id you/my-moe --dry_run
    python scripts/push_to_hub.py --model_name_or_path outputs/demo/model --repo_id you/my-moe --private true \\
        --license apache-2.0 --base_model HuggingFaceTB/SmolLM2-135M --scores outputs/demo/after.json

Log in first with `hf auth login`. What belongs to the model goes up, and the other files in the folder are listed as left
out. A folder without a card of yours gets one, which tells the base model, license, data, training and scores that the
records in the folder know; the license must be known or given.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling_moe.hub import push_folder
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.json_files import read_json
from modeling_moe.utils.locations import local_folder


@dataclass
class Arguments:
    """What to publish, and where."""

    model_name_or_path: str = field(metadata={"help": "folder of the saved model or adapter"})
    repo_id: str = field(metadata={"help": "owner/name on the Hub"})
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    dry_run: bool = field(default=False, metadata={"help": "check and list the files, upload and write nothing"})
    license: str | None = field(
        default=None, metadata={"help": "the Hub's identifier, such as apache-2.0; the recorded one if not given"}
    )
    language: list[str] | None = field(default=None, metadata={"help": "codes such as en, for the card"})
    base_model: str | None = field(
        default=None, metadata={"help": "owner/name of what it was made from; the recorded one if not given"}
    )
    scores: str | None = field(default=None, metadata={"help": "file of eval_lm.py's --output_json, for the card"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run Python code that the checkpoint brings, and publish it"}
    )


def main() -> None:
    """Checks, uploads and lists the files."""
    (args,) = parse([Arguments], __doc__)
    if args.scores is not None and not Path(args.scores).is_file():
        raise UserError(f"scores {args.scores}: there is no such file")
    published = push_folder(
        local_folder(args.model_name_or_path),
        args.repo_id,
        args.private,
        args.dry_run,
        trust_remote_code=args.trust_remote_code,
        base_model=args.base_model,
        license=args.license,
        language=args.language,
        metrics=read_json(Path(args.scores)) if args.scores else None,
    )
    table = Table("file", "bytes", title=f"{args.repo_id}{', nothing uploaded' if args.dry_run else ''}")
    for name, size in published.files.items():
        table.add_row(name, f"{size:,}")
    console = Console()
    console.print(table)
    if published.left_out:
        console.print(f"left out: {', '.join(published.left_out)}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    run(main, "nothing was uploaded if no file list was printed; start the command again")
