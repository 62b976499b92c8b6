# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""transformers' model families, dense and sparse, as configurations of this package's model."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from ...utils.loading import load_config
from ...utils.locations import read_json
from .base import Family, SourceFields
from .dense import DENSE_FAMILIES
from .sparse import SPARSE_FAMILIES


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
        UserError: if the family is another one, or the source has a field that cannot be held or that no model has.
    """
    if source.model_type == MoEConfig.model_type:
        return source
    fields = SourceFields(source)
    values = family_of(source).fields(fields)
    fields.refuse_unread()
    if "sliding_attention" not in (values.get("layer_types") or ["sliding_attention"]):
        values["sliding_window"] = None  # no layer has it
    try:
        return MoEConfig(**values, dtype=source.dtype)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"the config.json of this {source.model_type} model describes no model: {error}") from error


def source_config(folder: Path, gguf_file: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint in a folder; that of a family that transformers has no class for included.

    Raises:
        UserError: if there is none, it cannot be read, or it needs code that may not run.
    """
    file = folder / "config.json"
    if gguf_file:
        return load_config(str(folder), gguf_file, trust_remote_code=trust_remote_code)
    if not file.is_file():
        raise UserError(f"model_name_or_path {folder} has no config.json: it must be the folder of a model")
    values = read_json(file)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"model_type is {model_type!r} in {file}: it must be the name of a family, such as llama")
    if model_type in FAMILIES and model_type not in CONFIG_MAPPING:
        config = PreTrainedConfig(**values)
        config.model_type = model_type
        return config
    return load_config(str(folder), trust_remote_code=trust_remote_code)
