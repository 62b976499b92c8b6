# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module turns text and conversations of several domains into blocks of tokens to train on and to hold out.

Text: domains -> documents (rows of `text`) -> pieces (rows of `text` and `end`) -> training and held-out pieces ->
blocks.
Chat: domains -> conversations, or prompts with completions -> training and held-out rows -> blocks.
"""

from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.errors import UserError
from .packing import packer
from .sources import load_documents
from .tables import one_table


PIECE_CHARS = 4096


@dataclass
class DataArguments:
    """The data: the sources, their columns, and the size of blocks."""

    data: list[str] = field(
        metadata={
            "help": "domain=source ...; a source is a file of text, source code, .json, .jsonl, .csv, .tsv or .parquet, a "
            "folder or a pattern ('src/**/*.py') of files of one kind, or name[:config] on the Hub"
        }
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "column with the text or the messages; the default is the first that exists of messages, conversations "
            "(ShareGPT), prompt and completion, instruction, input and output (Alpaca), text"
        },
    )
    split: str = field(default="train", metadata={"help": "split of datasets on the Hub"})
    max_length: int = field(default=512, metadata={"help": "number of tokens in a block"})
    assistant_only: bool = field(
        default=True,
        metadata={
            "help": "in conversations and completions, use only the assistant's tokens for the loss; false: all tokens"
        },
    )

    def __post_init__(self):
        if self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}: a block needs at least 2 tokens")
        self.domains()

    def domains(self) -> dict[str, str]:
        """Returns the source of each domain.

        Raises:
            UserError: if an entry is not `name=source`, or two entries have one name.
        """
        domains = {}
        for entry in self.data:
            name, equals, source = entry.partition("=")
            if not (name and equals and source):
                raise UserError(f"data {entry!r} is malformed: write domain=source, such as wiki=wiki.txt")
            if name in domains:
                raise UserError(f"data names the domain {name!r} twice: give each source another name")
            domains[name] = source
        return domains

    def load(self, conversations: bool = False) -> dict[str, datasets.Dataset]:
        """Loads the documents of each domain with [`load_documents`]."""
        return {
            name: load_documents(source, self.text_column, self.split, conversations)
            for name, source in self.domains().items()
        }


def cut_documents(documents: datasets.Dataset, chars: int = PIECE_CHARS) -> datasets.Dataset:
    """Cuts documents at line ends into pieces of at least `chars` characters, so that some can be held out.

    Returns:
        Rows of `text` and `end`; `end` is true for the last piece of a document. The pieces of a document join to its
        text.
    """

    def cut(batch):
        pieces = {"text": [], "end": []}
        for text in batch["text"]:
            lines, size, parts = [], 0, []
            for line in text.splitlines(keepends=True):
                lines.append(line)
                size += len(line)
                if size >= chars:
                    parts.append("".join(lines))
                    lines, size = [], 0
            parts += ["".join(lines)] if lines else []
            pieces["text"] += parts
            pieces["end"] += [False] * (len(parts) - 1) + [True]
        return pieces

    return one_table(documents.map(cut, batched=True))


def hold_out(pieces: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits pieces at random; equal seeds give equal splits, and both parts keep the order of the pieces.

    Returns:
        The training pieces, and at least one held-out piece.

    Raises:
        UserError: if no piece would be left to train on.
    """
    count = max(1, round(fraction * len(pieces)))
    if count >= len(pieces):
        raise UserError(
            f"eval_fraction {fraction} leaves nothing to train on of {len(pieces)} pieces of text: give more text, "
            "with line breaks, or set eval_fraction to 0"
        )
    order = np.random.default_rng(seed).permutation(len(pieces))
    training, held_out = (pieces.select(np.sort(part)) for part in (order[count:], order[:count]))
    return one_table(training), one_table(held_out)


def load_and_pack(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, eval_fraction: float, seed: int
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset]]:
    """Loads all domains and packs them.

    Returns:
        The blocks of all domains to train on, and the held-out blocks of each domain.

    Raises:
        UserError: if the training or the held-out text of a domain does not fill a block.
    """
    train, held_out = [], {}
    for name, documents in args.load(conversations=True).items():
        pack_rows = packer(documents, tokenizer, args.assistant_only)
        pieces = cut_documents(documents) if "text" in documents.column_names else documents
        parts = {"training": pieces}
        if eval_fraction:
            parts = dict(zip(("training", "held-out"), hold_out(pieces, eval_fraction, seed), strict=True))
        blocks = {part: pack_rows(rows, tokenizer, args.max_length) for part, rows in parts.items()}
        for part, rows in blocks.items():
            if len(rows) == 0:
                turns = "" if pieces is not documents else ", or no conversation there has a turn of the assistant"
                raise UserError(
                    f"max_length {args.max_length} is more than the {part} text of domain {name!r} has tokens to learn{turns}: "
                    f"lower it{', or give more' if turns else ''}"
                )
        train.append(blocks["training"])
        held_out |= {name: blocks["held-out"]} if eval_fraction else {}
    return datasets.concatenate_datasets(train), held_out
