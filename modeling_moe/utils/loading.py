# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The commands load every model, tokenizer and configuration here, and no code of a checkpoint runs unless the user says so."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from ..cli import UserError


def parse_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of that name; None for `auto`.

    Raises:
        UserError: if it is none of the floating dtypes that a checkpoint is kept in.
    """
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"dtype {name!r} is unknown: it must be one of {', '.join(dtypes)}")
    return dtypes[name]


def load_model(
    name_or_path: str,
    gguf_file: str | None = None,
    dtype: str = "auto",
    distributed_config: DistributedConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal LM by path or Hub name, GGUF included: on the CPU, or split over processes.

    Raises:
        UserError: if transformers cannot load it; the message is transformers' own.
    """
    options: dict[str, Any] = {"dtype": parse_dtype(dtype) or "auto", "trust_remote_code": trust_remote_code}
    if gguf_file:
        options["gguf_file"] = gguf_file
    if distributed_config is not None:
        options["distributed_config"] = distributed_config
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model_name_or_path {name_or_path} cannot be loaded: {error}") from error


def load_tokenizer(
    name_or_path: str, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model by path or Hub name, GGUF included.

    Raises:
        UserError: if there is none.
    """
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{name_or_path} has no tokenizer that can be loaded: {error}") from error
    if tokenizer is None:
        raise UserError(f"{name_or_path} has no tokenizer: save one beside the model")
    return tokenizer


def load_config(
    name_or_path: str, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Loads the configuration of a model by path or Hub name, GGUF included.

    Raises:
        UserError: if transformers cannot load it.
    """
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model_name_or_path {name_or_path} has no configuration that can be loaded: {error}"
        ) from error
