# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module provides texts of many kinds, all made by Python's standard library, so that experiments need no download.

The texts depend on the version of Python alone.
"""

import ast
import base64
import calendar
import contextlib
import dis
import functools
import html.entities
import importlib
import inspect
import io
import json
import pickle
import pickletools
import plistlib
import pydoc
import string
import tokenize
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .python_text import SOURCE_MODULES


# number of bytes of each text
SIZE = 60_000
HELD_OUT_SHARE = 0.25


def _modules() -> Iterator[Any]:
    for name in SOURCE_MODULES:
        yield importlib.import_module(name)


def _sources() -> Iterator[str]:
    return (inspect.getsource(module) for module in _modules())


def _printed(write: Callable[[], object]) -> str:
    with io.StringIO() as text, contextlib.redirect_stdout(text):
        write()
        return text.getvalue()


def _names() -> list[tuple[int, str]]:
    """Returns the code points below 0x3000 that have a name."""
    return [(code, name) for code in range(0x3000) if (name := unicodedata.name(chr(code), ""))]


def _manual() -> Iterator[str]:
    from pydoc_data.topics import topics

    return iter(topics.values())


def _tokens() -> Iterator[str]:
    for source in _sources():
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            yield f"{tokenize.tok_name[token.type]:<10}{token.string!r}\n"


def _records() -> Iterator[str]:
    for code, name in _names():
        record = {"code": code, "name": name, "category": unicodedata.category(chr(code))}
        yield json.dumps(record | {"bidirectional": unicodedata.bidirectional(chr(code))}) + "\n"


def _tables() -> Iterator[str]:
    for code, name in _names():
        yield f"{code:04X};{name};{unicodedata.category(chr(code))};{unicodedata.combining(chr(code))};N\n"


def _plists() -> Iterator[str]:
    entities = list(html.entities.html5.items())
    for start in range(0, len(entities), 20):
        yield plistlib.dumps(dict(entities[start : start + 20])).decode()


def _hex_lines(source: str) -> Iterator[str]:
    data = source.encode()
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        shown = "".join(chr(byte) if chr(byte) in string.printable[:95] else "." for byte in row)
        yield f"{start:08x}  {row.hex(' ')}  |{shown}|\n"


def _shifted(text: str) -> str:
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    return text.translate(str.maketrans(lower + upper, lower[13:] + lower[:13] + upper[13:] + upper[:13]))


# domain -> function that yields parts of the domain's text
DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "manual": _manual,
    "code": _sources,
    "bytecode": lambda: (_printed(lambda m=module: dis.dis(m)) for module in _modules()),
    "syntax trees": lambda: (ast.dump(ast.parse(source), indent=1) for source in _sources()),
    "tokens": _tokens,
    "html": lambda: (pydoc.html.docmodule(module) for module in _modules()),
    "records": _records,
    "tables": _tables,
    "calendars": lambda: (calendar.TextCalendar().formatyear(year) for year in range(1900, 2000)),
    "property lists": _plists,
    "pickles": lambda: (
        _printed(lambda c=chunk: pickletools.dis(pickle.dumps(c, protocol=0)))
        for chunk in (_names()[start : start + 50] for start in range(0, 4000, 50))
    ),
    "dumps": lambda: (line for source in _sources() for line in _hex_lines(source)),
    "base 64": lambda: (base64.encodebytes(source.encode()).decode() for source in _sources()),
    "capitals": lambda: (text.upper() for text in _manual()),
    "shifted letters": lambda: (_shifted(text) for text in _manual()),
    "reversed": lambda: (text[::-1] for text in _manual()),
}


def _bytes_of(domain: str) -> np.ndarray:
    """Returns the first SIZE bytes of a domain, (n,) uint8."""
    parts, size = [], 0
    for part in DOMAINS[domain]():
        parts.append(part.encode("utf-8"))
        size += len(parts[-1])
        if size >= SIZE:
            break
    return np.frombuffer(b"".join(parts)[:SIZE], dtype=np.uint8)


@functools.cache
def domain_bytes(domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training bytes and the held-out bytes of a domain, the first three quarters of its text and the last."""
    text = _bytes_of(domain)
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    return text[:cut], text[cut:]
