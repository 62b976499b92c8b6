# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module loads the texts that a model is measured on, as documents of each domain and as token ids."""

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from ..utils.errors import UserError
from .documents import DataArguments, cut_documents


def load_domains(calibration_data: list[str]) -> dict[str, datasets.Dataset]:
    """Loads the documents of each domain.

    Args:
        calibration_data: entries `domain=source`, as in [`~modeling_moe.data.DataArguments`].

    Raises:
        UserError: if an entry is malformed, or its source does not exist or holds no text.
    """
    try:
        return DataArguments(data=calibration_data).load()
    except UserError as error:
        raise UserError(f"calibration_data: {error}") from error


def token_ids(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    name: str,
    tokens_field: str = "calibration_tokens",
    data_field: str = "calibration_data",
) -> torch.Tensor:
    """Returns the first `tokens` token ids (tokens,) int64 of a domain.

    The tokenizer's end-of-sequence token, if it has one, follows each document.

    Args:
        documents: rows of `text`.
        tokenizer: tokenizer of the model.
        tokens: number of tokens.
        name: name of the domain, for the message.
        tokens_field: name of the option that gave `tokens`, for the message.
        data_field: name of the option that gave the documents, for the message.

    Raises:
        UserError: if the domain has fewer tokens.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for piece in cut_documents(documents).to_iterable_dataset():
        ids += tokenizer(piece["text"], add_special_tokens=False, verbose=False).input_ids + eos * piece["end"]
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise UserError(
        f"{tokens_field} is {tokens}, but domain {name!r} of {data_field} has {len(ids)} tokens: lower it or "
        "give more text"
    )
