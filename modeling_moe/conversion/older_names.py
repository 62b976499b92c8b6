# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes config.json and tokenizer_config.json of an export so that transformers 4 can read them too.

transformers 5 renamed several fields and drops the old names when it saves. transformers 4, which most servers pin, takes a
default for a field that it does not find. transformers 5 reads old and new names.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..checkpoints import State
from ..utils.json_files import read_json, write_json


logger = logging.get_logger(__name__)

# transformers 4 stores these beside `rope_scaling` rather than in it
BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")

# constants of gpt-oss's experts in transformers 4 and in early releases of transformers 5
OLDER_CLAMP = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}


def older_names(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields of config.json under the names that transformers 4 reads.

    Args:
        config: configuration of one of transformers' families, with one rotary embedding for all layers.

    Returns:
        Names and values in JSON's types.
    """
    rope = config.rope_parameters
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {name: value for name, value in rope.items() if name not in BESIDE_SCALING}
        # transformers before 4.43 reads this key
        scaling["type"] = rope["rope_type"]
    fields = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if config.dtype is not None:
        fields["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    # the number of experts has two names, and releases differ in the name that they read
    fields |= {alias: getattr(config, name) for alias, name in config.attribute_map.items()}
    if hasattr(config, "max_window_layers"):
        fields["max_window_layers"] = _first_window(config)
    return fields


def _first_window(config: PreTrainedConfig) -> int:
    """Returns the index of the first layer in which transformers 4 applies `sliding_window`."""
    kinds = config.layer_types
    return kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)


def save_for_older_readers(config: PreTrainedConfig, folder: Path) -> None:
    """Writes config.json with the names of transformers 5 and of transformers 4.

    Args:
        config: configuration of one of transformers' families.
        folder: folder of the file.
    """
    config.save_pretrained(folder)
    width = getattr(config, "head_dim", None)
    if config.model_type == "granitemoeshared" and width not in (
        None,
        config.hidden_size // config.num_attention_heads,
    ):
        logger.warning(
            f"This granitemoeshared model has head_dim {width}, which transformers 4 does not read, so that it cannot load the "
            "weights: serve the model with transformers 5."
        )
    # of the targets, transformers 4 reads layer_types in gpt-oss alone
    if config.model_type != "gpt_oss" and len(set(getattr(config, "layer_types", None) or [])) > 1:
        logger.warning(
            f"This {config.model_type} model has a sliding window in some layers, and transformers 4 applies it in all "
            "layers: serve the model with transformers 5."
        )
    clamp = {name: getattr(config, name, value) for name, value in OLDER_CLAMP.items()}
    if config.model_type == "gpt_oss" and clamp != OLDER_CLAMP:
        logger.warning(
            f"This gpt_oss model has {clamp}; older releases of transformers compute {OLDER_CLAMP} whatever config.json says: "
            "serve the model with a release whose GptOssConfig declares swiglu_limit."
        )
    file = folder / "config.json"
    write_json(file, read_json(file) | older_names(config), sort_keys=True)


def warn_of_masked_groups(config: PreTrainedConfig, state: State) -> None:
    """Warns of selection biases with which transformers 4 chooses other experts than transformers 5.

    For the choice, transformers 4 gives 0 to the experts outside the groups that a token chose, and transformers 5 gives them
    minus infinity. A sigmoid score with a negative bias may be less than 0, and then transformers 4 leaves the chosen groups.

    Args:
        config: configuration of one of transformers' families.
        state: tensors of the export, of which the selection biases (E,) are read.
    """
    groups = getattr(config, "n_group", None) or 1
    if (getattr(config, "topk_group", None) or groups) >= groups:
        return
    biases = [tensor for name, tensor in state.items() if name.endswith("e_score_correction_bias")]
    lowest = min((bias.read().min().item() for bias in biases), default=0.0)
    if lowest < 0:
        logger.warning(
            f"This {config.model_type} model chooses {config.topk_group} of {groups} groups of experts (n_group), and its lowest "
            f"selection bias is {lowest:.3g}: with negative biases transformers 4 takes experts of other groups too, and "
            "computes other logits. Serve the model with transformers 5."
        )


def name_tokenizer_for_older_readers(folder: Path) -> None:
    """Writes tokenizer_config.json with the names that transformers 4 reads; transformers 5 reads them too.

    Args:
        folder: folder of a tokenizer; nothing happens if the file does not exist.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    values = read_json(file)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 expects a dictionary under this name
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(file, values, sort_keys=True)
