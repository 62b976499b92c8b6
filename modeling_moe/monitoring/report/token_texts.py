# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the text that each token of a sequence stands for, for a person to read."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


# stands for a token that ends a character which an earlier token has begun
CONTINUED = "…"
UNDECODABLE = "\ufffd"
# a character of UTF-8 has at most 4 bytes, and a token stands for at least one
MOST_TOKENS_OF_A_CHARACTER = 4


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    try:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except Exception as error:  # a tokenizer may be code of its own, which can raise anything
        raise ValueError(f"the tokenizer cannot turn its own tokens into text: {error}") from error
    return text if isinstance(text, str) else "".join(text)


def _added_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], lead: int, start: int, end: int) -> str:
    """Returns the text that tokens `start` to `end` add to tokens `lead` to `start`."""
    before = _decode(tokenizer, ids[lead:start]) if lead < start else ""
    return _decode(tokenizer, ids[lead:end])[len(before) :]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token in its context.

    A tokenizer may drop the space before the first token of a text, so each token is decoded after the one before it.

    Args:
        tokenizer: any tokenizer.
        ids: token ids, of which the tokenizer knows each.

    Returns:
        One text for each token. A character that several tokens spell is the text of the first of them, and
        `CONTINUED` that of the others; bytes that are no UTF-8 give U+FFFD.

    Raises:
        ValueError: if the tokenizer cannot decode.
    """
    texts: list[str] = []
    lead = 0
    while (start := len(texts)) < len(ids):
        for end in range(start + 1, min(start + MOST_TOKENS_OF_A_CHARACTER, len(ids)) + 1):
            text = _added_text(tokenizer, ids, lead, start, end)
            if UNDECODABLE not in text:
                lead = start
                break
        else:
            # the next token is decoded alone, since a broken character would swallow bytes of the token
            lead = end = start + 1
            text = _added_text(tokenizer, ids, start, start, end)
        texts += [text, *[CONTINUED] * (end - start - 1)]
    return texts


def token_label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns the text of a token without context; bytes that spell no whole character are shown as `<E2 80>`."""
    piece = tokenizer.convert_ids_to_tokens(token)
    piece = piece if isinstance(piece, str) else str(piece)
    text = _decode(tokenizer, [token])
    if UNDECODABLE in text:
        if hexadecimal := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return f"<{hexadecimal[1]}>"
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        if piece and all(character in byte_of for character in piece):
            return f"<{bytes(byte_of[character] for character in piece).hex(' ').upper()}>"
        return piece
    # sentencepiece's sign for a space, which its decoder drops at the beginning of a text
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text
