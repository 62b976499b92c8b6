# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""transformers' model families, dense and sparse, as configurations of this package's model."""

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..cli import UserError
from ..configuration_moe import MoEConfig
from ..utils.loading import load_config
from .dense_families import DENSE_FAMILIES
from .family import Family, SourceFields
from .sparse_families import SPARSE_FAMILIES


FAMILIES: dict[str, Family] = DENSE_FAMILIES | SPARSE_FAMILIES


def family_of(source: PreTrainedConfig) -> Family:
    """What converts models of this configuration.

    Raises:
        UserError: if nothing does.
    """
    if source.model_type not in FAMILIES:
        raise UserError(
            f"model_type {source.model_type!r} has no conversion: it must be one of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[source.model_type]


def moe_config(source: PreTrainedConfig) -> MoEConfig:
    """The configuration under which a [`MoEForCausalLM`] computes what the source model does.

    Args:
        source: configuration of one of `FAMILIES`, dense ones become a MoE whose layers are all dense; or a `MoEConfig`,
            which is returned as it is.

    Raises:
        UserError: if the family is another one, or the source has a field that cannot be held.
    """
    if source.model_type == MoEConfig.model_type:
        return source
    fields = SourceFields(source)
    values = family_of(source).fields(fields)
    fields.refuse_unread()
    return MoEConfig(**values, dtype=source.dtype)


def source_config(folder: Path, gguf_file: str | None = None) -> PreTrainedConfig:
    """The configuration of a checkpoint in a folder; that of a family that transformers has no class for included.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    file = folder / "config.json"
    if not gguf_file and not file.is_file():
        raise UserError(f"model_name_or_path {folder} has no config.json: it must be the folder of a model")
    try:
        if not gguf_file:
            values = json.loads(file.read_text())
            if values.get("model_type") in FAMILIES and values["model_type"] not in CONFIG_MAPPING:
                config = PreTrainedConfig(**values)
                config.model_type = values["model_type"]
                return config
        return load_config(str(folder), gguf_file)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_name_or_path {folder} has no configuration that can be read: {error}") from error
