# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This writes an exported config.json and tokenizer_config.json under the names that transformers 4 reads as well.

transformers 5 has other names for several fields and drops the old ones when it saves; transformers 4, which most servers
pin, takes a default for a field that it does not find. transformers 5 reads both.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# what transformers 4 keeps beside `rope_scaling`, not in it
BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")


def older_names(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of config.json under which transformers 4 finds what this configuration says.

    Args:
        config: of one of transformers' families, with one rotary embedding for all layers.

    Returns:
        Names and values in JSON's types.
    """
    rope = config.rope_parameters
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {name: value for name, value in rope.items() if name not in BESIDE_SCALING}
        # the key before transformers 4.43
        scaling["type"] = rope["rope_type"]
    fields = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    if rope["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if config.dtype is not None:
        fields["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    # of two names for a number of experts, each release of a family has its own
    fields |= {alias: getattr(config, name) for alias, name in config.attribute_map.items()}
    if hasattr(config, "max_window_layers"):
        fields["max_window_layers"] = _first_window(config)
    return fields


def _first_window(config: PreTrainedConfig) -> int:
    """The layer from which on transformers 4 takes `sliding_window`."""
    kinds = config.layer_types
    return kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)


def save_for_older_readers(config: PreTrainedConfig, folder: Path) -> None:
    """Writes config.json with transformers 5's names and transformers 4's.

    Args:
        config: of one of transformers' families.
        folder: where the file goes.
    """
    config.save_pretrained(folder)
    if len(set(getattr(config, "layer_types", None) or [])) > 1:
        logger.warning(
            f"This {config.model_type} has a window in some layers, and transformers 4 takes it in all of them: serve it "
            "with transformers 5."
        )
    file = folder / "config.json"
    _write(file, json.loads(file.read_text(encoding="utf-8")) | older_names(config))


def name_tokenizer_for_older_readers(folder: Path) -> None:
    """Writes what transformers 5 calls by a new name in tokenizer_config.json as transformers 4 does; 5 reads both.

    Args:
        folder: of a tokenizer; without the file nothing is done.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 has a dictionary under this name
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    _write(file, values)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
