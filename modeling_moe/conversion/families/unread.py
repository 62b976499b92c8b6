# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says why a model family of transformers has no conversion, and what works on its models all the same.

The reasons lie in unread.json beside this file, under the names of transformers' folders of models.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name

from ...utils.errors import UserError
from ...utils.json_files import read_json


REASONS_FILE = Path(__file__).with_name("unread.json")
TOOLS = (
    "`modeling_moe.watch` and `balance`, and the commands report, eval, resize (prune) and finetune (also LoRA on experts) "
    "work on transformers' own model"
)


def reasons() -> dict[str, str]:
    """Returns for each folder of transformers whose Mixture of Experts has no conversion what a MoE lacks."""
    return read_json(REASONS_FILE)


def follows_interface(folder: str) -> bool:
    """Returns whether a class in a folder of transformers' models follows the experts interface, without importing it."""
    spec = importlib.util.find_spec(f"transformers.models.{folder}")
    places = [] if spec is None else spec.submodule_search_locations or []
    files = (file for place in places for file in Path(place).glob("modeling_*.py"))
    return any("@use_experts_implementation" in file.read_text("utf-8") for file in files)


def unread_family(source: PreTrainedConfig, families: Iterable[str]) -> UserError:
    """Returns the error for a model whose family has no conversion.

    Args:
        source: configuration of the model.
        families: model types that have a conversion, with those of wrappers.
    """
    folder = model_type_to_module_name(source.model_type)
    start = f"model_type {source.model_type!r} has no conversion"
    if (reason := reasons().get(folder)) is not None:
        more = f". {TOOLS}" if follows_interface(folder) else ""
        return UserError(f"{start}: {reason}, which a MoE cannot hold{more}")
    text = source.get_text_config()
    if text is not source and text.model_type in families:
        return UserError(
            f"{start}: its text model is of the family {text.model_type}, which can be converted, but nobody has compared the "
            "two; save the text model alone, with its head, and convert that"
        )
    return UserError(f"{start}: it must be one of {', '.join(sorted(families))}")
