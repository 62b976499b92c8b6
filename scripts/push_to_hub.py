#!/usr/bin/env python
"""Publish a saved model: code, weights and card, after a clean process has loaded it by that code alone.

    python scripts/push_to_hub.py --model_name_or_path outputs/demo/model --repo_id you/my-moe --dry_run
    python scripts/push_to_hub.py --model_name_or_path outputs/demo/model --repo_id you/my-moe --private true

Log in first with `hf auth login`. A folder without a card gets one.
"""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from modeling_moe.cli import parse, run
from modeling_moe.hub import push_folder


@dataclass
class Arguments:
    """What to publish, and where."""

    model_name_or_path: str = field(metadata={"help": "folder of the saved model"})
    repo_id: str = field(metadata={"help": "owner/name on the Hub"})
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    dry_run: bool = field(default=False, metadata={"help": "check and list the files, upload nothing"})


def main() -> None:
    """Checks, uploads and lists the files."""
    (args,) = parse([Arguments], __doc__)
    files = push_folder(args.model_name_or_path, args.repo_id, args.private, args.dry_run)
    table = Table("file", "bytes", title=f"{args.repo_id}{', nothing uploaded' if args.dry_run else ''}")
    for name, size in files.items():
        table.add_row(name, f"{size:,}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
