# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps the configuration of any dense or sparse family to a `MoEConfig`."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...configuration_fields import sparse_only
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from ...utils.json_files import read_json
from ...utils.loading import load_config
from .attention_variants import ATTENTION_FAMILIES
from .base import Family, SourceFields
from .bias_routed import BIAS_ROUTED_FAMILIES
from .cohere import COHERE_FAMILIES
from .deepseek import DEEPSEEK_FAMILIES
from .dense import DENSE_FAMILIES
from .gpt_oss import GPT_OSS_FAMILIES
from .granite import GRANITE_FAMILIES
from .jetmoe import JETMOE_FAMILIES
from .kolibri import KOLIBRI_FAMILIES
from .phimoe import PHIMOE_FAMILIES
from .softmax import SOFTMAX_FAMILIES
from .text_models import TEXT_FAMILIES
from .unread import unread_family
from .wrappers import WRAPPERS, text_source


SPARSE_FAMILIES: dict[str, Family] = (
    SOFTMAX_FAMILIES
    | GRANITE_FAMILIES
    | DEEPSEEK_FAMILIES
    | BIAS_ROUTED_FAMILIES
    | ATTENTION_FAMILIES
    | COHERE_FAMILIES
    | GPT_OSS_FAMILIES
    | JETMOE_FAMILIES
    | KOLIBRI_FAMILIES
    | PHIMOE_FAMILIES
    | TEXT_FAMILIES
)
FAMILIES: dict[str, Family] = DENSE_FAMILIES | SPARSE_FAMILIES
# families for which no release of transformers has a configuration class, so that config.json names all fields
WITHOUT_CLASS = ("deepseek",)
MODELOPT = "hf_quant_config.json"
# fields that nothing reads in a model without sparse layers
SPARSE_ONLY = sparse_only(MoEConfig)


def family_of(source: PreTrainedConfig) -> Family:
    """Returns the conversion of the configuration's family; for a wrapper, of the text model's family.

    Raises:
        UserError: if the family has no conversion.
    """
    text = text_source(source)
    if text.model_type not in FAMILIES:
        raise unread_family(source, {*FAMILIES, *WRAPPERS})
    return FAMILIES[text.model_type]


def moe_config(source: PreTrainedConfig) -> MoEConfig:
    """Returns the configuration under which a [`MoEForCausalLM`] computes what the source model computes.

    Args:
        source: configuration of one of `FAMILIES`, or of a wrapper of one; a dense model becomes a MoE whose layers are all
            dense. A `MoEConfig` is returned unchanged.

    Raises:
        UserError: if the family is unknown, or the source has a field value that a MoE or any model cannot have.
    """
    if isinstance(source, MoEConfig):
        return source
    if source.model_type == MoEConfig.model_type:
        # this configuration's class comes from code that a checkpoint carries
        return MoEConfig.from_dict(source.to_dict())
    family, source = family_of(source), text_source(source)
    fields = SourceFields(source)
    values = family.fields(fields)
    fields.refuse_unread()
    if "sliding_attention" not in (values.get("layer_types") or ["sliding_attention"]):
        values["sliding_window"] = None  # no layer uses the window
    if "sparse" not in (values.get("mlp_layer_types") or ["sparse"]):
        values = {name: value for name, value in values.items() if name not in SPARSE_ONLY}
    try:
        return MoEConfig(**values, dtype=source.dtype)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"the config.json of this {source.model_type} model describes no model: {error}") from error


def fields_without_effect(source: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields of config.json that neither this package nor the source's own model reads, with their values.

    Args:
        source: configuration that [`moe_config`] accepts; of a wrapper, the text model's fields are judged.
    """
    if source.model_type == MoEConfig.model_type:
        return {}
    fields = SourceFields(text_source(source))
    family_of(source).fields(fields)
    return fields.refuse_unread()


def source_config(folder: Path, gguf_file: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Returns the configuration of a checkpoint in a folder, also for a family for which transformers has no class.

    Earlier versions of NVIDIA ModelOpt describe the quantisation only in hf_quant_config.json; it is read from there.

    Raises:
        UserError: if there is no configuration, it cannot be read, or it needs code that may not run.
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
    if model_type in WITHOUT_CLASS and model_type not in CONFIG_MAPPING:
        trusted = folder if trust_remote_code else None
        made = type("SourceConfig", (PreTrainedConfig,), {"model_type": model_type, "trusted_code": trusted})
        config = made(**values)
    else:
        config = load_config(str(folder), trust_remote_code=trust_remote_code)
    if (beside := folder / MODELOPT).is_file() and getattr(config, "quantization_config", None) is None:
        config.quantization_config = {"quant_method": "modelopt"} | (read_json(beside).get("quantization") or {})
    return config


def refuse_to_run(source: PreTrainedConfig) -> None:
    """Refuses to compare logits with a source that transformers does not load as a causal LM.

    Args:
        source: configuration that [`source_config`] returned.

    Raises:
        UserError: says what can be compared.
    """
    if len(WRAPPERS.get(source.model_type, ())) > 1:
        raise UserError(
            f"transformers computes no logits with a whole {source.model_type} model: convert it without a check, or save "
            f"its {WRAPPERS[source.model_type][0].removesuffix('_config')} alone and convert that"
        )
