# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module knows the published model types that transformers has no class for, but computes under another name."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


# model type of published configurations -> family of transformers whose code runs the model
TWINS = {"kimi_k2": "deepseek_v3"}


def twin_of(values: dict[str, Any]) -> str | None:
    """Returns the family of transformers that computes a published model, or None if transformers knows the model type itself.

    Args:
        values: content of config.json.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type in CONFIG_MAPPING:
        return None
    return TWINS.get(model_type)


def twin_config(values: dict[str, Any], name_or_path: str) -> PreTrainedConfig | None:
    """Returns the configuration of the family that [`twin_of`] names, or None without such a family.

    The configuration does not refer to code that the checkpoint brings, since transformers' own class takes the place of
    that code.

    Args:
        values: content of config.json.
        name_or_path: folder or Hub name of the model.
    """
    if (family := twin_of(values)) is None:
        return None
    known = {name: value for name, value in values.items() if name != "auto_map"} | {"model_type": family}
    return CONFIG_MAPPING[family].from_dict(known, name_or_path=name_or_path)
