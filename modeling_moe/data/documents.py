# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Text and conversations of several domains become blocks of tokens to train on and to hold out.

domains -> documents (rows of `text`) -> pieces (rows of `text` and `end`) -> training and held-out pieces -> blocks
domains -> conversations, or prompts with completions -> training and held-out ones -> blocks
"""

from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.errors import UserError
from .packing import packer
from .sources import load_documents


PIECE_CHARS = 4096


@dataclass
class DataArguments:
    """What to read and how."""

    data: list[str] = field(
        metadata={
            "help": "domain=source ..., a source being a file of text, source code, .json, .jsonl, .csv, .tsv or .parquet, a "
            "folder or a pattern ('src/**/*.py') of files of one kind, or name[:config] on the Hub"
        }
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "column that holds the text, or the messages; if not given: messages, conversations (ShareGPT), prompt "
            "and completion, instruction, input and output (Alpaca), or text, whichever is there first"
        },
    )
    split: str = field(default="train", metadata={"help": "split of the Hub's datasets"})
    max_length: int = field(default=512, metadata={"help": "tokens of a block"})
    assistant_only: bool = field(
        default=True,
        metadata={"help": "of conversations and completions count only what the assistant says; false: all tokens"},
    )

    def __post_init__(self):
        if self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}: a block needs at least 2 tokens")
        self.domains()

    def domains(self) -> dict[str, str]:
        """Source of each domain.

        Raises:
            UserError: if an entry is not `name=source`, or a name comes twice.
        """
        domains = {}
        for entry in self.data:
            name, equals, source = entry.partition("=")
            if not (name and equals and source):
                raise UserError(f"data {entry!r} is malformed: write domain=source, such as wiki=wiki.txt")
            if name in domains:
                raise UserError(f"data names the domain {name!r} twice: give each source its own name")
            domains[name] = source
        return domains

    def load(self, conversations: bool = False) -> dict[str, datasets.Dataset]:
        """Documents of each domain, see [`load_documents`]."""
        return {
            name: load_documents(source, self.text_column, self.split, conversations)
            for name, source in self.domains().items()
        }


def cut_documents(documents: datasets.Dataset, chars: int = PIECE_CHARS) -> datasets.Dataset:
    """Cuts documents at line ends into pieces of at least `chars` characters, so that a part can be held out.

    Returns:
        Rows of `text` and `end`, whether the piece is its document's last. A document's pieces join to its text.
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

    return documents.map(cut, batched=True)


def hold_out(pieces: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits at random, the same way for the same seed; both parts keep their order.

    Returns:
        Training and held-out pieces; the latter at least one.

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
    return pieces.select(np.sort(order[count:])), pieces.select(np.sort(order[:count]))


def load_and_pack(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, eval_fraction: float, seed: int
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset]]:
    """Blocks to train on, of all domains, and held-out blocks of each domain.

    Raises:
        UserError: if a part of a domain does not fill a block.
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
