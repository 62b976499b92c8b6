# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes blocks of tokens of text that every machine with Python has: its library and installed packages.

Files are split by a hash of folder and name, such as `urllib3/response.py`, so that a copy of a file within another package
falls on the same side. What is held out has no paragraph that is trained on.
"""

import csv
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from modeling_moe.data.documents import PIECE_CHARS, cut_documents
from modeling_moe.data.packing import pack
from modeling_moe.utils.errors import UserError


HELD_OUT = 20
FILE_BYTES = range(1_000, 100_000)
# more than a token has on average, so that what is asked for by characters gives the tokens that are wanted
TOKEN_CHARACTERS = 8


@dataclass(frozen=True)
class Text:
    """A text has documents to train on and held-out ones.

    Attributes:
        training: a text for each file.
        held_out: likewise.
        unread: files that are not there, or not UTF-8.
        copies: files whose text another file has.
        removed: paragraphs that were held out, and were in `training`.
    """

    training: list[str]
    held_out: list[str]
    unread: int
    copies: int
    removed: int


@dataclass(frozen=True)
class Blocks:
    """The blocks hold the tokens of a [`Text`].

    Attributes:
        training: (N, S) int64 on the CPU.
        held_out: rows of `input_ids` (S,) and `num_bytes` (S,), see [`~modeling_moe.data.documents.pack`].
    """

    training: torch.Tensor
    held_out: datasets.Dataset


def key_of(path: Path) -> int:
    """Hashes the names of a file and its folder to a number, by which files are ordered and split."""
    return int.from_bytes(hashlib.blake2b(f"{path.parent.name}/{path.name}".encode(), digest_size=8).digest(), "big")


def is_held_out(path: Path) -> bool:
    """Says whether a file is held out, which one in 20 is."""
    return key_of(path) % HELD_OUT == 0


def installed_sources() -> list[Path]:
    """Lists the Python files of 1 to 100 kB of the library (without tests) and of all installed packages, in no order.

    The packages' own lists are read, and not their folders, which take long to walk. Of files that these lists give the
    same hash, one is returned.
    """
    files = {}
    for distribution in distributions():
        for name, digest, size, *_ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
            if name.endswith(".py") and size and int(size) in FILE_BYTES:
                files[digest] = Path(str(distribution.locate_file(name)))
    library = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "test", "tests")]
        library += [Path(folder, name) for name in names if name.endswith(".py")]
    return [*files.values(), *(path for path in library if path.stat().st_size in FILE_BYTES)]


def sources_in(folder: Path) -> list[Path]:
    """Lists the .py and .txt files of a folder and of those in it, in no order.

    Raises:
        UserError: if there are none.
    """
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".txt") and path.is_file()]
    if not files:
        raise UserError(f"text_dir {folder} holds no file .py or .txt: correct the path")
    return files


def without_seen(held_out: list[str], training: list[str]) -> tuple[list[str], int]:
    """Removes the paragraphs of held-out texts that are in `training`; returns what is left, and how many these were."""
    seen = {paragraph.strip() for text in training for paragraph in text.split("\n\n")}
    texts, removed = [], 0
    for text in held_out:
        paragraphs = text.split("\n\n")
        new = [paragraph for paragraph in paragraphs if paragraph.strip() not in seen]
        removed += len(paragraphs) - len(new)
        texts.append("\n\n".join(new))
    return [text for text in texts if text], removed


def read_text(paths: list[Path], characters: int, held_out: int) -> Text:
    """Reads files in the order of [`key_of`] until there is enough text.

    Args:
        paths: in any order, which changes nothing.
        characters: to train on; the file that reaches the number is the last one.
        held_out: characters to hold out, likewise, before repeated paragraphs are removed.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    wanted, counts = (characters, held_out), [0, 0]
    seen, unread, copies = set(), 0, 0
    for path in sorted(paths, key=lambda path: (key_of(path), str(path))):
        side = is_held_out(path)
        if counts[side] >= wanted[side]:
            continue
        try:
            text = path.read_text("utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            unread += 1
            continue
        content = hashlib.blake2b("".join(text.split()).encode(), digest_size=16).digest()
        if content in seen:
            copies += 1
            continue
        seen.add(content)
        texts[side].append(text)
        counts[side] += len(text)
    kept, removed = without_seen(texts[1], texts[0])
    return Text(texts[0], kept, unread, copies, removed)


def make_blocks(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, held_out: int) -> Blocks:
    """Makes blocks of tokens to train on, and `held_out` blocks from places all over the held-out text.

    Raises:
        UserError: if there is too little text.
    """
    if not text.training or not text.held_out:
        raise UserError("text_dir holds too few files to train on some and hold others out: name another folder")
    training = pack(datasets.Dataset.from_dict({"text": text.training}), tokenizer, length)
    pieces: datasets.Dataset = cut_documents(datasets.Dataset.from_dict({"text": text.held_out})).shuffle(seed=0)
    # enough of them for the blocks, and not all to tokenise
    pieces = pieces.select(range(min(len(pieces), 1 + TOKEN_CHARACTERS * held_out * length // PIECE_CHARS)))
    scored = pack(pieces, tokenizer, length, for_scoring=True)
    full = [row for row, ids in enumerate(scored["input_ids"]) if len(ids) == length]
    if len(full) < held_out or not len(training):
        raise UserError(
            f"held_out is {held_out}, but the text gives {len(full)} held-out blocks of {length} tokens and {len(training)} "
            "to train on: lower it, or give more text"
        )
    rows = torch.tensor([list(ids) for ids in training["input_ids"]])
    return Blocks(rows, scored.select(full[:held_out]))
