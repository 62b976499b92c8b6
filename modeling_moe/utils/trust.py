# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's own code is told from foreign code by its hash: this package runs the former, the user allows the latter."""

import re
from pathlib import Path

from .earlier_code import EARLIER
from .hashes import hash_file
from .locations import read_json


PACKAGE = Path(__file__).parents[1]
# transformers runs these files of a folder that it is told to trust
CODE = ("*.py", "custom_generate/**/*.py")
DESCRIPTIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def own_code() -> dict[str, set[str]]:
    """The SHA-256 hashes that each file of code may have which a checkpoint brings: of this version, or of an earlier one."""
    hashes = {file.name: {hash_file(file)} for file in PACKAGE.glob("*.py")}
    for files in EARLIER.values():
        for name, digest in files.items():
            hashes.setdefault(name, set()).add(digest)
    return hashes


def code_files(folder: str | Path) -> list[str]:
    """The files of code in a folder that transformers may run when it trusts the checkpoint, relative to the folder."""
    folder = Path(folder)
    files = {file for pattern in CODE for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in files)


def foreign_code(folder: str | Path) -> list[str]:
    """What transformers would run from a checkpoint's folder that this package did not write, or from elsewhere.

    Args:
        folder: of a checkpoint.

    Returns:
        Names of files whose bytes are not those that this package, or a listed earlier version, saves beside a model;
        and entries of `auto_map` that name code in another repository or folder. Empty if there is none.

    Raises:
        UserError: if a description such as config.json is damaged.
    """
    folder, own = Path(folder), own_code()
    foreign = [name for name in code_files(folder) if hash_file(folder / name) not in own.get(name, ())]
    for description in DESCRIPTIONS:
        if (folder / description).is_file():
            foreign += [
                f"{description}: {reference}"
                for reference in _references(read_json(folder / description).get("auto_map"))
                if not re.fullmatch(r"\w+\.\w+", reference)
            ]
    return foreign


def _references(code: object) -> list[str]:
    """The classes that an `auto_map` names: one for each auto class, or a pair, or a list of the slow and the fast one."""
    if isinstance(code, str):
        return [code]
    items = code.values() if isinstance(code, dict) else code if isinstance(code, list) else ()
    return [reference for item in items for reference in _references(item)]
