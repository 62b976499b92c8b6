# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Layers that predict further tokens lie in files of their own beside a model, which no loader of the model reads.

Such layers (multi-token prediction, MTP) draft tokens for speculative decoding. `model.safetensors.index.json` lists only the
model's own files, so transformers, vLLM and SGLang load the model without them and without a warning.
"""

import re
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .errors import UserError
from .json_files import read_json
from .lineage import CONVERSION
from .locations import local_folder


logger = logging.get_logger(__name__)

# entry of a recipe in conversion.json
ENTRY = "prediction_layers"
# fields of a family's configuration with the number of such layers
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")
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


def _holds_prediction(name: str | Path) -> bool:
    """Returns whether a model has such files: a folder shows them, and conversion.json tells of them on the Hub."""
    folder = local_folder(name)
    if Path(folder).is_dir():
        return bool(prediction_files(folder))
    file = cached_file(
        folder,
        CONVERSION,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    recipe = read_json(Path(file)).get("recipe") if file else None
    return isinstance(recipe, dict) and ENTRY in recipe


def _warn(name: str | Path, result: str) -> None:
    logger.warning(
        f"{result} gets no layers that predict further tokens, as {name} has them: they were trained for the unchanged model."
    )


def warn_of_left_out(name: str | Path, result: str) -> None:
    """Warns in one sentence if a model has such files, which a changed model does not keep.

    Args:
        name: folder or Hub name of the model that was changed.
        result: what was made of the model, such as "The merged model".
    """
    if _holds_prediction(name):
        _warn(name, result)


def leave_out_prediction(model: PreTrainedModel, name: str | Path, result: str) -> None:
    """Sets the number of layers that predict further tokens to 0 in a changed model, and warns in one sentence.

    transformers loads a model without such layers and keeps their number in config.json, where servers and
    `generate(use_mtp=True)` then look for tensors that are not there.

    Args:
        model: the changed model, before it is saved.
        name: folder or Hub name of the model that was changed.
        result: what was made of the model, such as "The merged model".
    """
    config = model.config.get_text_config()
    announced = [count for count in COUNTS if getattr(config, count, None)]
    for count in announced:
        setattr(config, count, 0)
    if announced or _holds_prediction(name):
        _warn(name, result)
