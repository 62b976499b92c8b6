# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This writes result folders that are whole or not there, and copies what lies beside a source's weights."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cli import UserError
from .utils.loading import load_tokenizer


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


def refuse_occupied(output_dir: Path, overwrite: bool) -> None:
    """Raises UserError if `output_dir` exists, is not empty and may not be replaced."""
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite):
        raise UserError(f"output_dir {output_dir} is not empty: choose another, or pass --overwrite to replace it")


def put_in_place(partial: Path, output_dir: Path) -> None:
    """Renames a finished folder; the one that it replaces is put aside until it is there."""
    replaced = output_dir.with_name(f".{output_dir.name}.replaced")
    try:
        if output_dir.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed
            output_dir.rename(replaced)
        partial.rename(output_dir)
    finally:
        if replaced.exists() and not output_dir.exists():
            replaced.rename(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def whole_folder(output_dir: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `output_dir` that takes its place if the block succeeds and is removed if not.

    Raises:
        UserError: if `output_dir` exists, is not empty and may not be replaced.
    """
    output_dir = Path(output_dir)
    refuse_occupied(output_dir, overwrite)
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(name_or_path: str, output_dir: Path, gguf_file: str | None = None) -> None:
    """Copies the tokenizer's files and the chat template of a local folder byte by byte.

    From a GGUF file, or a model on the Hub, they are loaded and saved instead. A source without a tokenizer gives none.
    """
    if Path(name_or_path).is_dir() and not gguf_file:
        for pattern in COMPANIONS:
            for file in Path(name_or_path).glob(pattern):
                target = output_dir / file.name
                shutil.copytree(file, target) if file.is_dir() else shutil.copyfile(file, target)
        return
    load_tokenizer(name_or_path, gguf_file).save_pretrained(output_dir)
