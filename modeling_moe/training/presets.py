# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes a model with random weights from a configuration file, to train it from scratch."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..utils.errors import UserError
from ..utils.loading import parse_dtype, refuse_misfit
from ..utils.presets import presets


SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def preset_file(name_or_path: str) -> Path | None:
    """Finds the configuration file that a name stands for, such as `moe_tiny`.

    Args:
        name_or_path: path of a file that ends in `.json`, name of a shipped preset, or `configuration/models/NAME.json`,
            which is found from any folder.

    Returns:
        The file, which may not exist; None if the name is not that of a configuration but of a model.
    """
    path, shipped = Path(name_or_path), presets()
    if path.suffix != ".json":
        return None if path.is_dir() else shipped.get(name_or_path)
    if not path.is_file() and path.parent == Path("configuration/models"):
        return shipped.get(path.stem, path)
    return path


def is_preset(name_or_path: str) -> bool:
    """Returns whether `name_or_path` names a configuration rather than a model."""
    return preset_file(name_or_path) is not None


def preset_config(
    file: str, tokenizer: PreTrainedTokenizerBase | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Reads a configuration file.

    Args:
        file: path of a config.json, or name of a shipped preset.
        tokenizer: sets the vocabulary size and the special tokens, if given.
        trust_remote_code: allows Python code that the file names to run.

    Raises:
        UserError: if the file does not exist, or is not a configuration.
    """
    path = preset_file(file) or Path(file)
    if not path.is_file():
        raise UserError(f"model_name_or_path {file} does not exist: correct the path of the configuration")
    fields = {}
    if tokenizer is not None:
        tokens = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
        fields = {"vocab_size": tokens} | {name: getattr(tokenizer, name) for name in SPECIAL}
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model_name_or_path {file} is not the configuration of a causal LM: {error}") from error


def new_model(
    file: str, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32", *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Makes a model with random weights; equal seeds of torch give equal weights.

    Args:
        file: path of a config.json, or name of a shipped preset.
        tokenizer: sets the vocabulary size and the special tokens of the model.
        dtype: `float32`, `bfloat16` or `float16`, or `auto` for the dtype of the configuration.
        trust_remote_code: allows Python code that the file names to run.

    Raises:
        UserError: if the file is not the configuration of a causal LM.
    """
    config = preset_config(file, tokenizer, trust_remote_code=trust_remote_code)
    dtype_of_weights = parse_dtype(dtype) or config.dtype or torch.float32
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of_weights, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model_name_or_path {file} makes no causal LM: {error}") from error
    model.generation_config = GenerationConfig.from_model_config(config)
    refuse_misfit(tokenizer, model)
    return model
