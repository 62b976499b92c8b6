# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Files beside a model's weights, such as tokenizer and chat template, are copied unchanged by this module."""

import shutil
from pathlib import Path

from .errors import UserError
from .locations import leads_outside


COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "generation_config.json",
)


def find_companions(source: Path) -> list[Path]:
    """Returns tokenizer files, chat template and generation config of a model's folder.

    Raises:
        UserError: if one of the files is a link that leads outside the folder.
    """
    found = [file for pattern in COMPANIONS for file in sorted(source.glob(pattern))]
    for file in found:
        for part in (file, *(file.rglob("*") if file.is_dir() else ())):
            if leads_outside(part, source):
                raise UserError(f"{part} is a link that leads outside the folder: put the file itself there")
    return found


def copy_companions(source: Path, output_dir: Path) -> None:
    """Copies the files that [`find_companions`] returns; a folder without a tokenizer gives none.

    Raises:
        UserError: if one of the files is a link that leads outside the folder.
    """
    for file in find_companions(source):
        target = output_dir / file.name
        shutil.copytree(file, target) if file.is_dir() else shutil.copyfile(file, target)
