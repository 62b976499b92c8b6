# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What lies beside a source's weights, tokenizer and chat template, is copied as it is."""

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
    """The tokenizer's files, the chat template and the generation config of a model's folder.

    Raises:
        UserError: if one of them is a link that leads out of the folder.
    """
    found = [file for pattern in COMPANIONS for file in sorted(source.glob(pattern))]
    for file in found:
        for part in (file, *(file.rglob("*") if file.is_dir() else ())):
            if leads_outside(part, source):
                raise UserError(f"{part} is a link that leads outside the folder: put the file itself there")
    return found


def copy_companions(source: Path, output_dir: Path) -> None:
    """Copies what [`find_companions`] finds byte by byte; a source without a tokenizer gives none.

    Raises:
        UserError: if one of the files is a link that leads out of the folder.
    """
    for file in find_companions(source):
        target = output_dir / file.name
        shutil.copytree(file, target) if file.is_dir() else shutil.copyfile(file, target)
