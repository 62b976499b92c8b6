# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the text that each token of a sequence stands for, for a person to read."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


# stands for a token that ends a character which an earlier token has begun
CONTINUED = "…"
UNDECODABLE = "\ufffd"
# a character of UTF-8 has at most 4 bytes, and a token stands for at least one
MOST_TOKENS_OF_A_CHARACTER = 4


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def _group_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], lead: int, start: int) -> int:
    """Returns the end of the shortest group of tokens from `start` that spells whole characters.

    Bytes that are no UTF-8 form a group of one token.
    """
    for end in range(start + 1, min(start + MOST_TOKENS_OF_A_CHARACTER, len(ids)) + 1):
        if not _decode(tokenizer, ids[lead:end]).endswith(UNDECODABLE):
            return end
    return start + 1


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token in its context.

    A tokenizer may drop the space before the first token of a text, so each token is decoded after the one before it.

    Args:
        tokenizer: any tokenizer.
        ids: token ids, of which the tokenizer knows each.

    Returns:
        One text for each token. A character that several tokens spell is the text of the first of them, and
        `CONTINUED` that of the others; bytes that are no UTF-8 give U+FFFD.
    """
    texts: list[str] = []
    lead = 0
    while (start := len(texts)) < len(ids):
        end = _group_end(tokenizer, ids, lead, start)
        before = _decode(tokenizer, ids[lead:start]) if lead < start else ""
        texts += [_decode(tokenizer, ids[lead:end])[len(before) :], *[CONTINUED] * (end - start - 1)]
        lead = start
    return texts


def token_label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns the text of a token without context; bytes that spell no whole character are shown as `<E2 80>`."""
    piece = tokenizer.convert_ids_to_tokens(token)
    piece = piece if isinstance(piece, str) else str(piece)
    text = _decode(tokenizer, [token])
    if UNDECODABLE in text:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        if piece and all(character in byte_of for character in piece):
            return f"<{bytes(byte_of[character] for character in piece).hex(' ').upper()}>"
        return piece
    # sentencepiece's sign for a space, which its decoder drops at the beginning of a text
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text
