# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Text, conversations and completions become blocks of tokens, with labels that say which tokens to learn or to score."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.chat import encode_chat
from ..utils.errors import UserError


# ids of tokens, whether each counts, and the UTF-8 bytes of the text that each stands for
Tokens = tuple[list[int], list[bool], list[int]]
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def _token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Bytes of UTF-8 text that each token adds to those before it; they sum to the text's."""
    if not offsets:
        return np.zeros(0, dtype=int)
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.diff(np.concatenate([[0], sizes.cumsum()])[ends], prepend=0)


def _check_fast(tokenizer: PreTrainedTokenizerBase, for_scoring: bool) -> None:
    if for_scoring and not tokenizer.is_fast:
        raise UserError("the model's tokenizer is not a fast one, which is needed to count bytes: convert it")


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], ends: list[bool], for_scoring: bool, counts: bool = True
) -> list[Tokens]:
    """Tokens of texts, an eos of no bytes after each whose end is one; no bytes at all if not for scoring."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=for_scoring, verbose=False)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for i, (text, tokens, end) in enumerate(zip(texts, encoded["input_ids"], ends, strict=True)):
        ids = tokens + eos * end
        sizes = (
            [*_token_bytes(text, encoded["offset_mapping"][i]).tolist(), *[0] * len(eos * end)] if for_scoring else []
        )
        parts.append((ids, [counts] * len(ids), sizes))
    return parts


def _join(parts: Iterable[Tokens]) -> Tokens:
    ids, counts, sizes = [list(chain.from_iterable(column)) for column in zip(*parts, strict=True)] or ([], [], [])
    return ids, counts, sizes


def _blocks(tokens: Tokens, max_length: int, for_scoring: bool) -> dict[str, list[list[int]]]:
    """Cuts into blocks; those without a token to predict are left away, for scoring the last may be shorter."""
    ids, counts, sizes = tokens
    labels = [token if counted else -100 for token, counted in zip(ids, counts, strict=True)]
    starts = range(0, len(ids) - (1 if for_scoring else max_length - 1), max_length)
    # a block's first token is predicted from nothing
    starts = [i for i in starts if any(counts[i + 1 : i + max_length])]
    columns = {"input_ids": ids, "labels": labels} | ({"num_bytes": sizes} if for_scoring else {})
    return {name: [column[i : i + max_length] for i in starts] for name, column in columns.items()}


def _pack(
    rows: datasets.Dataset, encode: Callable[[dict], list[Tokens]], max_length: int, for_scoring: bool, desc: str
) -> datasets.Dataset:
    def tokenise(batch):
        return _blocks(_join(encode(dict(batch))), max_length, for_scoring)

    columns = ["input_ids", "labels", *(["num_bytes"] if for_scoring else [])]
    return rows.map(
        tokenise,
        batched=True,
        batch_size=None if for_scoring else 1000,
        remove_columns=rows.column_names,
        features=datasets.Features({name: datasets.List(datasets.Value("int64")) for name in columns}),
        desc=desc,
    )


def pack(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, for_scoring: bool = False
) -> datasets.Dataset:
    """Tokenises texts, joins them and cuts them into blocks of `max_length` tokens.

    No special tokens but the tokenizer's eos, if it has one, after each document.

    Args:
        texts: rows of `text`, and of `end` where texts are pieces of documents.
        tokenizer: any; with `for_scoring` one of the fast ones.
        max_length: tokens of a block.
        for_scoring: join all texts, keep the last, shorter block if it has at least 2 tokens, and count bytes;
            otherwise every 1000 texts are joined on their own and what does not fill a block is dropped.

    Returns:
        Rows of `input_ids` and `labels` (both alike), with `for_scoring` also of `num_bytes`, the UTF-8 bytes of the text
        that each token stands for: they sum to the text's, and an eos has 0.
    """
    _check_fast(tokenizer, for_scoring)

    def encode(batch: dict) -> list[Tokens]:
        ends = batch.get("end", [True] * len(batch["text"]))
        return _encode_texts(tokenizer, batch["text"], ends, for_scoring)

    return _pack(texts, encode, max_length, for_scoring, "tokenising")


def _messages(rows: Any) -> Any:
    """Messages of `role` and `content`, made of ShareGPT's `from` and `value` where they are that; others as they are."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return rows
    if any(row.get("role") is not None or not isinstance(row.get("from"), str) for row in rows):
        return rows
    roles = [ROLES.get(row["from"], row["from"]) for row in rows]
    if unknown := set(roles) - {"system", "user", "assistant", "tool"}:
        raise UserError(f"a message is from {unknown.pop()!r}: write human, gpt, system or tool")
    return [{"role": role, "content": row.get("value")} for role, row in zip(roles, rows, strict=True)]


def _tools(row: dict) -> list | None:
    """JSON schemas of the functions that a conversation may call; some keep them as a text."""
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
        conversations: rows of `messages`, with `role` and `content` or ShareGPT's `from` and `value`, or of such lists in
            `prompt` and `completion`; perhaps of `tools` and of `system`.
        tokenizer: one with a chat template.
        max_length: tokens of a block.
        for_scoring: as for [`pack`].
        assistant_only: count what the assistant says, and of `prompt` and `completion` only what it says in the latter;
            otherwise count all tokens.

    Returns:
        Rows as from [`pack`], with labels of -100 where a token does not count, and 0 bytes for a special token. A block without a token that counts is
        dropped.

    Raises:
        UserError: if there is no chat template, it cannot render a conversation, or, with `assistant_only`, does not tell
            what the assistant says.
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
        text, encoded, counts = encode_chat(tokenizer, messages, _tools(row), assistant_only, len(before))
        ids, sizes = encoded["input_ids"], []
        if for_scoring:
            sizes = _token_bytes(text, encoded["offset_mapping"]).tolist()
            sizes = [0 if token in special else size for token, size in zip(ids, sizes, strict=True)]
        return ids, [bool(counted) for counted in counts], sizes

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

    A prompt is tokenised on its own, as it is when the model is asked to continue it; an eos follows each completion.

    Args:
        rows: rows of `prompt` and `completion`, both texts.
        tokenizer: as for [`pack`].
        max_length: tokens of a block.
        for_scoring: as for [`pack`].
        assistant_only: count the completions' tokens and the eos, otherwise all tokens.

    Returns:
        Rows as from [`pack_conversations`].
    """
    _check_fast(tokenizer, for_scoring)

    def encode(batch: dict) -> list[Tokens]:
        ends = [True] * len(batch["prompt"])
        prompts = _encode_texts(
            tokenizer, batch["prompt"], [False] * len(ends), for_scoring, counts=not assistant_only
        )
        completions = _encode_texts(tokenizer, batch["completion"], ends, for_scoring)
        return [_join(pair) for pair in zip(prompts, completions, strict=True)]

    return _pack(rows, encode, max_length, for_scoring, "tokenising")


def packer(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, assistant_only: bool
) -> Callable[..., datasets.Dataset]:
    """What packs such rows: [`pack`], [`pack_conversations`] or [`pack_completions`], called with rows, `tokenizer`,
    `max_length` and perhaps `for_scoring`."""
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
