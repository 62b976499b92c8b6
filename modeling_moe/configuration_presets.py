# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the configurations that are shipped with the package, by name."""

import difflib
from pathlib import Path


_FOLDER = Path(__file__).parent / "configuration" / "models"


def preset_files() -> dict[str, Path]:
    """Returns the file of each shipped configuration by its name, in alphabetical order.

    Raises:
        ValueError: if this file was loaded from a checkpoint, which brings no presets.
    """
    if not _FOLDER.is_dir():
        raise ValueError("presets come with the package and not with a checkpoint: install modeling_moe.")
    return {file.stem: file for file in sorted(_FOLDER.glob("*.json"))}


def preset_file(name: str) -> Path:
    """Returns the file of one shipped configuration.

    Raises:
        ValueError: for a name that no preset has; the message lists the names.
    """
    files = preset_files()
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of them."
        raise ValueError(f"there is no preset {name!r} among {', '.join(files)}: {hint}")
    return files[name]
