# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module recognises the code that this package saves with checkpoints; other code needs the user's permission."""

import re
from pathlib import Path

from .earlier_code import EARLIER
from .hashes import hash_file
from .json_files import read_json


PACKAGE = Path(__file__).parents[1]
# patterns of files that transformers can run with trust_remote_code=True
CODE = ("*.py", "custom_generate/**/*.py")
DESCRIPTIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def known_code() -> dict[str, set[str]]:
    """Returns for each file of code that a checkpoint carries the SHA-256 hashes of this version and of earlier versions."""
    hashes = {file.name: {hash_file(file)} for file in PACKAGE.glob("*.py")}
    for files in EARLIER.values():
        for name, digest in files.items():
            hashes.setdefault(name, set()).add(digest)
    return hashes


def code_files(folder: str | Path) -> list[str]:
    """Returns the paths, relative to the folder, of the code that transformers may run when it trusts the checkpoint."""
    folder = Path(folder)
    files = {file for pattern in CODE for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in files)


def foreign_code(folder: str | Path) -> list[str]:
    """Returns the code that transformers would run for a checkpoint and that this package did not write.

    Args:
        folder: folder of a checkpoint.

    Returns:
        Names of files whose bytes differ from those that this package, or a listed earlier version, saves with a model;
        and entries of `auto_map` that name code in another repository or folder. Empty if there is none.

    Raises:
        UserError: if a description such as config.json is damaged.
    """
    folder, known = Path(folder), known_code()
    foreign = [name for name in code_files(folder) if hash_file(folder / name) not in known.get(name, ())]
    for description in DESCRIPTIONS:
        if (folder / description).is_file():
            foreign += [
                f"{description}: {reference}"
                for reference in _references(read_json(folder / description).get("auto_map"))
                if not re.fullmatch(r"\w+\.\w+", reference)
            ]
    return foreign


def _references(code: object) -> list[str]:
    """Returns the class references in an `auto_map`: texts, or lists of a slow and a fast class, one per auto class."""
    if isinstance(code, str):
        return [code]
    items = code.values() if isinstance(code, dict) else code if isinstance(code, list) else ()
    return [reference for item in items for reference in _references(item)]
