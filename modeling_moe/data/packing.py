# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module packs text, conversations and completions into blocks of tokens with labels."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.chat import encode_chat
from ..utils.errors import UserError
from .tables import one_table


ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


class Tokens(NamedTuple):
    """Tokens of one or more texts.

    Attributes:
        ids: token ids.
        learned: whether each token is to be learned or scored.
        sizes: UTF-8 bytes of the text that each token stands for; empty if not for scoring.
    """

    ids: list[int]
    learned: list[bool]
    sizes: list[int]


def _token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Returns how many UTF-8 bytes each token adds to the tokens before it; the sum is the size of the text."""
    if not offsets:
        return np.zeros(0, dtype=int)
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.diff(np.concatenate([[0], sizes.cumsum()])[ends], prepend=0)


def _check_fast(tokenizer: PreTrainedTokenizerBase, for_scoring: bool) -> None:
    if for_scoring and not tokenizer.is_fast:
        raise UserError("the model's tokenizer is not a fast one, and only those count bytes: convert it")


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], ends: list[bool], for_scoring: bool, learned: bool = True
) -> list[Tokens]:
    """Tokenises texts, and adds an eos of 0 bytes after each text that ends a document."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=for_scoring, verbose=False)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for i, (text, tokens, end) in enumerate(zip(texts, encoded["input_ids"], ends, strict=True)):
        ids = tokens + eos * end
        sizes = (
            [*_token_bytes(text, encoded["offset_mapping"][i]).tolist(), *[0] * len(eos * end)] if for_scoring else []
        )
        parts.append(Tokens(ids, [learned] * len(ids), sizes))
    return parts


def _join(parts: Iterable[Tokens]) -> Tokens:
    parts = list(parts)
    return Tokens(
        list(chain.from_iterable(part.ids for part in parts)),
        list(chain.from_iterable(part.learned for part in parts)),
        list(chain.from_iterable(part.sizes for part in parts)),
    )


def _blocks(tokens: Tokens, max_length: int, for_scoring: bool) -> dict[str, list[list[int]]]:
    """Cuts tokens into blocks. Blocks without a token to predict are dropped; for scoring, the last may be shorter."""
    ids, learned, sizes = tokens
    labels = [token if learn else -100 for token, learn in zip(ids, learned, strict=True)]
    starts = range(0, len(ids) - (1 if for_scoring else max_length - 1), max_length)
    # nothing predicts the first token of a block
    starts = [i for i in starts if any(learned[i + 1 : i + max_length])]
    columns = {"input_ids": ids, "labels": labels} | ({"num_bytes": sizes} if for_scoring else {})
    return {name: [column[i : i + max_length] for i in starts] for name, column in columns.items()}


def _pack(
    rows: datasets.Dataset, encode: Callable[[dict], list[Tokens]], max_length: int, for_scoring: bool, desc: str
) -> datasets.Dataset:
    def tokenise(batch):
        return _blocks(_join(encode(dict(batch))), max_length, for_scoring)

    columns = ["input_ids", "labels", *(["num_bytes"] if for_scoring else [])]
    blocks = rows.map(
        tokenise,
        batched=True,
        batch_size=None if for_scoring else 1000,
        remove_columns=rows.column_names,
        features=datasets.Features({name: datasets.List(datasets.Value("int64")) for name in columns}),
        desc=desc,
    )
    return one_table(blocks)


def pack(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, for_scoring: bool = False
) -> datasets.Dataset:
    """Tokenises texts, joins them and cuts them into blocks of `max_length` tokens.

    The tokenizer's eos, if it has one, follows each document. No other special tokens are added.

    Args:
        texts: rows of `text`, and of `end` if the texts are pieces of documents (true for the last piece).
        tokenizer: any tokenizer; with `for_scoring`, a fast one.
        max_length: number of tokens in a block.
        for_scoring: join all texts, keep a shorter last block of at least 2 tokens, and count bytes. Otherwise each
            1000 texts are joined, and the rest that does not fill a block is dropped.

    Returns:
        Rows of `input_ids` and `labels`, which are equal. With `for_scoring` also `num_bytes`, the UTF-8 bytes that
        each token stands for: 0 for an eos, and in sum the size of the texts.
    """
    _check_fast(tokenizer, for_scoring)

    def encode(batch: dict) -> list[Tokens]:
        ends = batch.get("end", [True] * len(batch["text"]))
        return _encode_texts(tokenizer, batch["text"], ends, for_scoring)

    return _pack(texts, encode, max_length, for_scoring, "tokenising")


def _messages(rows: Any) -> Any:
    """Turns ShareGPT's messages (`from`, `value`) into messages of `role` and `content`; other rows stay as they are."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return rows
    if any(row.get("role") is not None or not isinstance(row.get("from"), str) for row in rows):
        return rows
    roles = [ROLES.get(row["from"], row["from"]) for row in rows]
    if unknown := set(roles) - {"system", "user", "assistant", "tool"}:
        raise UserError(f"a message is from {unknown.pop()!r}: write human, gpt, system or tool")
    return [{"role": role, "content": row.get("value")} for role, row in zip(roles, rows, strict=True)]


def _tools(row: dict) -> list | None:
    """Returns the JSON schemas of the functions that a conversation may call; some data sets store them as text."""
    tools = row.get("tools")
    try:
        return json.loads(tools) if isinstance(tools, str) and tools else tools or None
    except ValueError as error:
        raise UserError(f"the tools are not JSON: {tools!r:.100}: {error}") from error


def pack_conversations(
    conversations: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    for_scoring: bool = False,
    assistant_only: bool = True,
) -> datasets.Dataset:
    """Renders conversations by the tokenizer's chat template, joins them and cuts into blocks of `max_length` tokens.

    Args:
        conversations: rows of `messages`, or of `prompt` and `completion`, and optionally of `tools` and `system`.
            Messages have `role` and `content`, or ShareGPT's `from` and `value`.
        tokenizer: a tokenizer with a chat template.
        max_length: number of tokens in a block.
        for_scoring: the argument of [`pack`].
        assistant_only: learn or score only the assistant's tokens, and with `prompt` and `completion` only those in
            the completion. Otherwise all tokens.

    Returns:
        The rows that [`pack`] returns, with label -100 for a token that is not learned, and 0 bytes for a special
        token. Blocks without a token to learn are dropped.

    Raises:
        UserError: if there is no chat template, if it cannot render a conversation, or, with `assistant_only`, if it
            does not show which tokens are the assistant's.
    """
    _check_fast(tokenizer, for_scoring)

    special = set(tokenizer.all_special_ids)

    def encode_row(row: dict) -> Tokens:
        before = _messages(row["prompt"]) if "messages" not in row else []
        if row.get("system"):
            before = [{"role": "system", "content": row["system"]}]
        messages = _messages(row["messages"] if "messages" in row else row["completion"])
        if before and isinstance(messages, list):
            messages = before + messages
        text, encoded, learned = encode_chat(tokenizer, messages, _tools(row), assistant_only, len(before))
        ids, sizes = encoded["input_ids"], []
        if for_scoring:
            sizes = _token_bytes(text, encoded["offset_mapping"]).tolist()
            sizes = [0 if token in special else size for token, size in zip(ids, sizes, strict=True)]
        return Tokens(ids, [bool(learn) for learn in learned], sizes)

    def encode(batch: dict) -> list[Tokens]:
        return [encode_row(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]

    return _pack(conversations, encode, max_length, for_scoring, "rendering conversations")


def pack_completions(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    for_scoring: bool = False,
    assistant_only: bool = True,
) -> datasets.Dataset:
    """Tokenises prompts and their completions as plain text, joins them and cuts into blocks of `max_length` tokens.

    Prompt and completion are tokenised separately, as in generation. An eos follows each completion.

    Args:
        rows: rows of `prompt` and `completion`, both texts.
        tokenizer: any tokenizer; with `for_scoring`, a fast one.
        max_length: number of tokens in a block.
        for_scoring: the argument of [`pack`].
        assistant_only: learn or score the tokens of the completion and the eos; otherwise all tokens.

    Returns:
        The rows that [`pack_conversations`] returns.
    """
    _check_fast(tokenizer, for_scoring)

    def encode(batch: dict) -> list[Tokens]:
        ends = [True] * len(batch["prompt"])
        prompts = _encode_texts(
            tokenizer, batch["prompt"], [False] * len(ends), for_scoring, learned=not assistant_only
        )
        completions = _encode_texts(tokenizer, batch["completion"], ends, for_scoring)
        return [_join(pair) for pair in zip(prompts, completions, strict=True)]

    return _pack(rows, encode, max_length, for_scoring, "tokenising")


def packer(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, assistant_only: bool
) -> Callable[..., datasets.Dataset]:
    """Returns the function that packs a domain's rows: [`pack`], [`pack_conversations`] or [`pack_completions`].

    Call it with rows, `tokenizer`, `max_length` and optionally `for_scoring`.
    """
    columns = documents.column_names
    if "text" in columns:
        return pack
    plain = "completion" in columns and getattr(documents.features["completion"], "dtype", None) in (
        "string",
        "large_string",
    )
    if plain and ("messages" not in columns or tokenizer.chat_template is None):
        return partial(pack_completions, assistant_only=assistant_only)
    return partial(pack_conversations, assistant_only=assistant_only)
