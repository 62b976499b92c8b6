# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A wrapper joins a text model with towers for images, video or sound; this module takes the text model out of a wrapper.

transformers builds the text model of a wrapper from the nested text configuration alone, so that the other fields of the
wrapper, except `tie_word_embeddings`, cannot change what the text model computes. Without images and sound, a wrapper computes
what its text model computes: positions of several dimensions (mrope) are then equal in all dimensions, which is plain rotation.
"""

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from ...checkpoints import State
from ...utils.errors import UserError


# model type of a wrapper whose logits of texts were compared with those of its text model -> names of the nested
# configurations on the way to the text model's
WRAPPERS: dict[str, tuple[str, ...]] = {
    "aria": ("text_config",),
    "deepseek_ocr2": ("text_config",),
    "gemma3": ("text_config",),
    "glm4v_moe": ("text_config",),
    "internvl": ("text_config",),
    "kimi_k25": ("text_config",),
    "llava": ("text_config",),
    "mistral3": ("text_config",),
    "qwen3_omni_moe": ("thinker_config", "text_config"),
    "qwen3_omni_moe_thinker": ("text_config",),
    "qwen3_vl_moe": ("text_config",),
}
# start of a tensor's name in a wrapper, or in a text model without a head -> start of the name in a text model; the first
# that fits counts. Checkpoints of older releases have the names with `language_model` in front.
STARTS = {
    # transformers 5.24 saves Kimi-K2.5's layers so
    "language_model.model.blocks.": "model.layers.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "language_model.": "model.",
    "lm_head.": "lm_head.",
    **{
        start: f"model.{part}."
        for part in ("embed_tokens", "layers", "norm")
        for start in (f"model.{part}.", f"{part}.")
    },
}


def text_source(source: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration of the text model of a wrapper; any other configuration is returned as it is.

    Raises:
        UserError: if the wrapper's config.json has no text model.
    """
    text = outer = source
    for name in WRAPPERS.get(source.model_type, ()):
        outer, text = text, getattr(text, name, None)
        if not isinstance(text, PreTrainedConfig):
            raise UserError(
                f"{name} is missing in the config.json of this {source.model_type} model: download it again"
            )
    if text is source:
        return source
    text = copy.deepcopy(text)
    # transformers ties the head of a wrapper by the wrapper's own field
    text.tie_word_embeddings = outer.tie_word_embeddings
    for name in ("dtype", "quantization_config"):
        if getattr(text, name, None) is None and (value := getattr(source, name, None)) is not None:
            setattr(text, name, value)
    return text


def text_values(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config.json that describes the text model; all of it for a model that is no wrapper."""
    for name in WRAPPERS.get(str(values.get("model_type")), ()):
        values = values.get(name) or {}
        if not isinstance(values, dict):
            return {}
    return values


def towers(source: PreTrainedConfig) -> list[str]:
    """Returns the names of a wrapper's nested configurations that describe something else than the text model."""
    found, level = [], source
    for name in WRAPPERS.get(source.model_type, ()):
        nested = [key for key in level.sub_configs if isinstance(getattr(level, key, None), PreTrainedConfig)]
        found += sorted(key for key in nested if key != name)
        level = getattr(level, name)
    return found


def _renamed(state: State, source: PreTrainedConfig) -> Iterator[tuple[str, str | None]]:
    """Yields the names of a checkpoint's tensors with their names in a text model, or None for another tower's tensor."""
    wrapped = source.model_type in WRAPPERS
    nested = [f"{name.removesuffix('_config')}." for name in WRAPPERS.get(source.model_type, ())[:-1]]
    if source.model_type.endswith("_thinker"):
        nested.append("thinker.")
    for name in state:
        inner = name
        for start in nested:
            inner = inner.removeprefix(start)
        start = next((start for start in STARTS if inner.startswith(start)), None)
        if start is not None:
            yield name, STARTS[start] + inner.removeprefix(start)
        else:
            yield name, None if wrapped else name


def text_tensors(state: State, source: PreTrainedConfig) -> State:
    """Returns the tensors of a checkpoint's text model under the names of a text model with a head; nothing is read.

    Args:
        state: tensors of a wrapper, of a text model, or of a text model without a head.
        source: configuration of the checkpoint.

    Raises:
        UserError: if two tensors of a wrapper have one name in the text model.
    """
    result: State = {}
    for name, text_name in _renamed(state, source):
        if text_name in result:
            raise UserError(
                f"the source has two tensors for {text_name}, one of them {name}: remove one of the two from its files"
            )
        if text_name is not None:
            result[text_name] = state[name]
    return result


def left_out(state: State, source: PreTrainedConfig) -> dict[str, int]:
    """Returns the number of parameters of each part of a wrapper that its text model does not have, such as model.visual."""
    counts: dict[str, int] = {}
    for name, text_name in _renamed(state, source):
        if text_name is None:
            parts = name.split(".")
            depth = 1 + next((i for i, part in enumerate(parts) if part not in ("model", "thinker")), 0)
            tower = ".".join(parts[:depth])
            counts[tower] = counts.get(tower, 0) + state[name].numel
    return counts
