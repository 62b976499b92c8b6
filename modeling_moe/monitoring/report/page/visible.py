# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes texts of unknown origin safe to show: every character can be seen, and none changes the text around it.

Escaping for HTML and for JSON is the page's work; these functions only replace characters that have no glyph.
"""

import unicodedata


# an ellipsis stands for what was cut off
ELLIPSIS = "\u2026"
NAMED = {"\n": "\u21b5", "\t": "\u21e5", "\x7f": "\u2421"}


def visible(text: str) -> str:
    """Returns `text` with a symbol in place of each character that cannot be seen.

    Control characters become symbols such as U+2400; direction marks, zero-width characters, lone surrogates and code
    points without a character become `⟨U+202E⟩`. Spaces stay. A combining mark at the start gets a dotted circle.
    """
    if not text.isprintable():
        text = "".join(map(_symbol, text))
    return f"\u25cc{text}" if text and unicodedata.combining(text[0]) else text


def shorten(text: str, limit: int) -> str:
    """Returns [`visible`] text of at most `limit` characters; an ellipsis stands for the rest.

    A visible text may be several times longer than the text, so only its start is converted.
    """
    shown = visible(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + ELLIPSIS


def _symbol(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if character in NAMED:
        return NAMED[character]
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\u27e8U+{code:04X}\u27e9"
