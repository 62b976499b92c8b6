# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package reads files, folders and datasets as documents, and packs documents into blocks of tokens."""

from .calibration_text import load_domains, token_ids
from .documents import PIECE_CHARS, DataArguments, cut_documents, hold_out, load_and_pack
from .packing import pack, pack_completions, pack_conversations, packer
from .sources import load_documents
from .tables import one_table


__all__ = [
    "PIECE_CHARS",
    "DataArguments",
    "cut_documents",
    "hold_out",
    "load_and_pack",
    "load_documents",
    "load_domains",
    "one_table",
    "pack",
    "pack_completions",
    "pack_conversations",
    "packer",
    "token_ids",
]
