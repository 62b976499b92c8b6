# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module provides the texts that every Python installation contains, so that experiments need no download."""

import importlib
import inspect

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
