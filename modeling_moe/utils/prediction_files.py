# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Layers that predict further tokens lie in files of their own beside a model, which no loader of the model reads.

Such layers (multi-token prediction, MTP) draft tokens for speculative decoding. `model.safetensors.index.json` lists only the
model's own files, so transformers, vLLM and SGLang load the model without them and without a warning.
"""

import re
from pathlib import Path

from transformers.utils import logging

from .errors import UserError


logger = logging.get_logger(__name__)

STEM = "mtp"
PATTERN = f"{STEM}*.safetensors"
NAME = re.compile(rf"{STEM}(?:-\d{{5}}-of-(\d{{5}}))?\.safetensors")


def prediction_files(folder: str | Path) -> list[str]:
    """Returns the names of the files in a folder that hold layers which predict further tokens.

    Raises:
        UserError: if one of several such files is missing.
    """
    names = sorted(file.name for file in Path(folder).glob(PATTERN) if NAME.fullmatch(file.name))
    for name in names:
        match = NAME.fullmatch(name)
        count = int(match[1] or 1) if match else 1
        if len(names) != count:
            raise UserError(f"{folder} has {len(names)} files {PATTERN}, where the name {name} asks for {count}")
    return names


def warn_of_left_out(folder: str | Path, result: str) -> None:
    """Warns in one sentence if a folder holds layers that predict further tokens, which a changed model does not keep.

    Args:
        folder: folder of the model that is changed; a name on the Hub passes.
        result: what is made of the model, such as "the merged model".
    """
    if Path(folder).is_dir() and prediction_files(folder):
        logger.warning(
            f"{result} gets no layers that predict further tokens ({PATTERN} in {folder}): they were trained for the "
            "unchanged model."
        )
