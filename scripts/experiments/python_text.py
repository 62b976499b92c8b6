# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module provides the texts that every Python installation contains, so that experiments need no download."""

import importlib
import inspect
import sysconfig
from pathlib import Path

import datasets


# modules of Python's library whose source code is read
SOURCE_MODULES = (
    "argparse",
    "dataclasses",
    "difflib",
    "doctest",
    "inspect",
    "logging",
    "pdb",
    "pydoc",
    "statistics",
    "subprocess",
    "tarfile",
    "threading",
    "typing",
    "unittest.mock",
)


def python_documents() -> dict[str, datasets.Dataset]:
    """Returns two domains of documents: topics of Python's language reference, and modules of Python's library."""
    from pydoc_data.topics import topics

    sources = [inspect.getsource(importlib.import_module(module)) for module in SOURCE_MODULES]
    texts = {"documentation": list(topics.values()), "code": sources}
    return {name: datasets.Dataset.from_dict({"text": documents}) for name, documents in texts.items()}


def library_documents() -> list[str]:
    """Returns all topics of Python's language reference, then all modules in the first level of Python's library."""
    from pydoc_data.topics import topics

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [*topics.values(), *(module.read_text("utf-8") for module in modules)]


def without_seen(held_out: list[str], training: list[str]) -> tuple[list[str], int]:
    """Removes the paragraphs of held-out texts that `training` contains; returns the rest and the number removed."""
    seen = {paragraph.strip() for text in training for paragraph in text.split("\n\n")}
    texts, removed = [], 0
    for text in held_out:
        paragraphs = text.split("\n\n")
        new = [paragraph for paragraph in paragraphs if paragraph.strip() not in seen]
        removed += len(paragraphs) - len(new)
        texts.append("\n\n".join(new))
    return [text for text in texts if text], removed
