# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Layers that predict further tokens are kept beside a converted model, and written back where their family is the target.

DeepSeek-V3, GLM-4.5, Mellum and others publish such layers (multi-token prediction, MTP) with the model: under
`model.layers.N` with N from the number of the model's own layers on, or under a name that begins with `mtp`. They add nothing
to the logits; servers and transformers' `generate(use_mtp=True)` draft tokens with them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..checkpoints import State, read_tensors
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.lineage import CONVERSION
from ..utils.prediction_files import COUNTS, ENTRY, PATTERN, prediction_files
from .families.base import PREDICTION
from .families.quantized import dequantised
from .families.wrappers import text_source, text_tensors


NAMED = re.compile(r"(^|\.)mtp(_\w+)?\.")
NUMBERED = re.compile(r"(^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class PredictionLayers:
    """The layers of a checkpoint that predict further tokens.

    Attributes:
        model_type: family whose names and fields they have; None if conversion.json does not tell.
        state: tensors, unread, under the family's names.
        fields: fields of the family's config.json that describe the layers.
        files: names of the files in the checkpoint's folder that hold nothing else.
    """

    model_type: str | None
    state: State
    fields: dict[str, Any]
    files: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.state.values())

    def record(self) -> dict[str, Any]:
        """Returns what conversion.json keeps."""
        return {"model_type": self.model_type, "fields": self.fields}


def _own_and_further(source: PreTrainedConfig) -> tuple[int, int]:
    """Returns the number of the model's own layers, and of the layers that predict further tokens."""
    counts = [getattr(source, name, None) for name in ("num_hidden_layers", *COUNTS)]
    own, *further = (count if isinstance(count, int) else 0 for count in counts)
    return own, max(further)


def split_prediction(state: State, source: PreTrainedConfig) -> tuple[State, State]:
    """Splits tensors on disk into those of the model, and those of the layers that predict further tokens.

    Args:
        state: tensors of a text model, under the names of the model's family.
        source: configuration of the text model, whose num_nextn_predict_layers (num_mtp_layers) says how many layers follow
            the model's own ones.
    """
    own, further = _own_and_further(source)

    def predicts(name: str) -> bool:
        match = NUMBERED.search(name)
        return bool(NAMED.search(name)) or (match is not None and own <= int(match[2]) < own + further)

    kept = {name: tensor for name, tensor in state.items() if predicts(name)}
    return {name: tensor for name, tensor in state.items() if name not in kept}, kept


def prediction_layers(state: State, source: PreTrainedConfig) -> PredictionLayers | None:
    """Returns the layers of a source that predict further tokens, dequantised as the model is; None if it has none.

    Args:
        state: tensors as on disk.
        source: configuration of the source.
    """
    text = text_source(source)
    _, kept = split_prediction(text_tensors(state, source), text)
    if not kept:
        return None
    fields = {name: value for name, value in text.to_dict().items() if PREDICTION.search(name) and value is not None}
    settings = getattr(text, "quantization_config", None)
    return PredictionLayers(text.model_type, dequantised(kept, settings), fields)


def kept_prediction_layers(folder: Path) -> PredictionLayers | None:
    """Returns the layers that an earlier conversion kept in a folder of this package; None if it has none.

    Raises:
        UserError: if a file is missing or damaged, or conversion.json does not describe the layers as a run wrote them.
    """
    file = folder / CONVERSION
    recipe = read_json(file).get("recipe") if file.is_file() else None
    entry = recipe.get(ENTRY) if isinstance(recipe, dict) else None
    if not (files := prediction_files(folder)):
        if entry is not None:
            raise UserError(
                f"{folder} lacks {PATTERN}, which its {CONVERSION} tells of: download it, or remove {ENTRY} from {CONVERSION}"
            )
        return None
    state: State = {}
    for name in files:
        state |= read_tensors(folder / name)
    if entry is None:
        return PredictionLayers(None, state, {}, tuple(files))
    model_type, fields = (entry.get("model_type"), entry.get("fields")) if isinstance(entry, dict) else (None, None)
    if (
        not isinstance(fields, dict)
        or not all(map(PREDICTION.search, fields))
        or not isinstance(model_type, str | None)
    ):
        raise UserError(f"{file} is damaged: its {ENTRY} is {entry!r:.100}, which no run wrote; remove {PATTERN} too")
    return PredictionLayers(model_type, state, fields, tuple(files))


def restored(config: PreTrainedConfig, layers: PredictionLayers | None) -> tuple[PreTrainedConfig, State]:
    """Gives an exported configuration the fields of the layers that predict further tokens.

    Args:
        config: configuration of one of transformers' families; it is changed.
        layers: layers of the same family; None sets a number of such layers to 0, where the family's class has one.

    Returns:
        The configuration, and the tensors to write with the model.
    """
    if layers is not None:
        for name, value in layers.fields.items():
            setattr(config, name, value)
        return config, layers.state
    for name in COUNTS:
        if getattr(config, name, None):
            setattr(config, name, 0)
    return config, {}
