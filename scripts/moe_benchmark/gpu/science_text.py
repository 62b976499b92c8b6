# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes blocks of tokens from the text of Python's library and the installed packages.

Files are split by a hash of folder and name, such as `urllib3/response.py`, so that a copy of a file in another
package is on the same side of the split. Held-out text contains no paragraph of the training text.
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
from experiments.python_text import without_seen
from transformers import PreTrainedTokenizerBase

from modeling_moe.data import PIECE_CHARS, cut_documents, pack
from modeling_moe.utils.errors import UserError


HELD_OUT = 20
FILE_BYTES = range(1_000, 100_000)
# characters per token, above the average, so that the requested characters contain enough tokens
TOKEN_CHARACTERS = 8


@dataclass(frozen=True)
class Text:
    """Holds documents to train on and held-out documents.

    Attributes:
        training: text of each training file.
        held_out: text of each held-out file.
        unread: number of files that do not exist or are not UTF-8.
        copies: number of files whose text equals that of another file.
        removed: number of held-out paragraphs that were removed because `training` contains them.
    """

    training: list[str]
    held_out: list[str]
    unread: int
    copies: int
    removed: int


@dataclass(frozen=True)
class Blocks:
    """Holds the tokens of a [`Text`].

    Attributes:
        training: (N, S) int64 on the CPU.
        held_out: rows of `input_ids` (S,) and `num_bytes` (S,), see [`~modeling_moe.data.packing.packer`].
    """

    training: torch.Tensor
    held_out: datasets.Dataset


def key_of(path: Path) -> int:
    """Returns a hash of the names of a file and its folder, by which files are ordered and split."""
    return int.from_bytes(hashlib.blake2b(f"{path.parent.name}/{path.name}".encode(), digest_size=8).digest(), "big")


def is_held_out(path: Path) -> bool:
    """Returns whether a file is held out; one file in 20 is."""
    return key_of(path) % HELD_OUT == 0


def installed_sources() -> list[Path]:
    """Returns the Python files of 1 to 100 kB of Python's library (without tests) and of all installed packages,
    in no order.

    The packages' own lists of files are read, because walking their folders takes long. Of files with equal hashes in
    these lists, one is returned.
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
    """Returns the .py and .txt files of a folder and its sub-folders, in no order.

    Raises:
        UserError: if there are none.
    """
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".txt") and path.is_file()]
    if not files:
        raise UserError(f"text_dir {folder} contains no .py or .txt file: correct the path")
    return files


def read_text(paths: list[Path], characters: int, held_out: int) -> Text:
    """Reads files in the order of [`key_of`] until there is enough text.

    Args:
        paths: files; their order has no effect.
        characters: characters to train on; the file that reaches this number is the last one.
        held_out: characters to hold out, before repeated paragraphs are removed.
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


def _dataset(result: datasets.Dataset | datasets.DatasetDict) -> datasets.Dataset:
    """Returns the dataset; datasets' own annotations say that its methods may return a DatasetDict."""
    if not isinstance(result, datasets.Dataset):
        raise TypeError("a Dataset was expected, not a DatasetDict.")
    return result


def make_blocks(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, held_out: int) -> Blocks:
    """Makes blocks of tokens to train on, and `held_out` blocks from places spread over the held-out text.

    Raises:
        UserError: if there is too little text.
    """
    if not text.training or not text.held_out:
        raise UserError("text_dir contains too few files to train on some and hold out others: name another folder")
    training = pack(datasets.Dataset.from_dict({"text": text.training}), tokenizer, length)
    pieces = _dataset(cut_documents(datasets.Dataset.from_dict({"text": text.held_out})).shuffle(seed=0))
    # only as many pieces as the blocks need are tokenised
    pieces = _dataset(pieces.select(range(min(len(pieces), 1 + TOKEN_CHARACTERS * held_out * length // PIECE_CHARS))))
    scored = pack(pieces, tokenizer, length, for_scoring=True)
    full = [row for row, ids in enumerate(scored["input_ids"]) if len(ids) == length]
    if len(full) < held_out or not len(training):
        raise UserError(
            f"held_out is {held_out}, but the text gives {len(full)} held-out blocks of {length} tokens and {len(training)} "
            "to train on: lower it, or give more text"
        )
    rows = torch.tensor([list(ids) for ids in training["input_ids"]])
    return Blocks(rows, _dataset(scored.select(full[:held_out])))
