# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says why a model family of transformers has no conversion."""

from collections.abc import Iterable

from transformers import PreTrainedConfig

from ...utils.errors import UserError


def unread_family(source: PreTrainedConfig, text: PreTrainedConfig, families: Iterable[str]) -> UserError:
    """TODO"""
    return UserError(
        f"model_type {source.model_type!r} has no conversion: it must be one of {', '.join(sorted(families))}"
    )
