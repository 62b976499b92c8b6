# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Text and conversations to blocks of tokens.

domains -> documents (rows of `text`) -> pieces (rows of `text` and `end`) -> training and held-out pieces -> blocks
domains -> conversations (rows of `messages`) -> training and held-out conversations -> blocks
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..cli import UserError


logger = logging.get_logger(__name__)

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PIECE_CHARS = 4096


@dataclass
class DataArguments:
    """What to read and how."""

    data: list[str] = field(
        metadata={
            "help": "domain=source ..., a source being a .txt, .json, .jsonl or .parquet file, a folder of files of one of "
            "these kinds, or name[:config] on the Hub"
        }
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "column that holds the text (not for .txt); if not given, fine-tuning takes the conversations in "
            "'messages' if there are any, and else 'text'"
        },
    )
    split: str = field(default="train", metadata={"help": "split of the Hub's datasets"})
    max_length: int = field(default=512, metadata={"help": "tokens of a block"})

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


def _local_files(path: Path) -> list[str]:
    """Files of a source on disk, all of one kind."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in BUILDERS and file.is_file())
    kinds = {BUILDERS.get(file.suffix.lower()) for file in files}
    if not files or None in kinds:
        where = ", and holds no such file" if path.is_dir() else ""
        raise UserError(f"data {path} is none of {', '.join(BUILDERS)}{where}: convert it, or name what is")
    if len(kinds) > 1:
        raise UserError(f"data {path} holds files of several kinds: give each kind a folder, and a domain, of its own")
    return [str(file) for file in files]


def _read(source: str, text_column: str, split: str) -> datasets.Dataset:
    """Rows of a source with all their columns; those of text files have only `text_column`."""
    path = Path(source)
    if not path.exists() and path.suffix.lower() in BUILDERS:
        raise UserError(f"data {source} does not exist: correct the path")
    try:
        if not path.exists():
            name, _, config = source.partition(":")
            return datasets.load_dataset(name, config or None, split=split)
        files = _local_files(path)
        builder = BUILDERS[Path(files[0]).suffix.lower()]
        if builder == "text":
            return datasets.Dataset.from_dict({text_column: [Path(file).read_text("utf-8") for file in files]})
        return datasets.load_dataset(builder, data_files=files, split="train")
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data {source} cannot be read as files or a dataset on the Hub: {error}") from error


def load_documents(
    source: str, text_column: str | None = None, split: str = "train", conversations: bool = False
) -> datasets.Dataset:
    """Documents of a source: a .txt file is one, elsewhere each row is one.

    Args:
        source: path of a .txt, .json, .jsonl or .parquet file or of a folder of files of one of these kinds, or `name`
            or `name:config` of a dataset on the Hub.
        text_column: column that holds the text, not for .txt; `text` if not given.
        split: split of a dataset on the Hub.
        conversations: take the column `messages`, if there is one, unless `text_column` is given.

    Returns:
        Rows with one column: `text`, none of which is empty, or `messages`, each a list of dicts with `role` and
        `content`, as a chat template takes it.

    Raises:
        UserError: if there is no such source, it has no such column, or no text.
    """
    prefers_messages, text_column = conversations and text_column is None, text_column or "text"
    documents = _read(source, text_column, split)
    if prefers_messages and "messages" in documents.column_names:
        return documents.select_columns("messages")
    if text_column not in documents.column_names:
        columns = ", ".join(documents.column_names)
        raise UserError(f"text_column {text_column!r} is not in {source}: choose one of {columns}")
    feature = documents.features[text_column]
    documents = documents.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise UserError(f"text_column {text_column!r} of {source} holds {feature}: choose a text one")
    documents = documents.filter(lambda text: bool(text), input_columns="text")
    if len(documents) == 0:
        raise UserError(f"data {source} holds no text: give a source that does")
    return documents


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


def _token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Bytes of UTF-8 text that each token adds to those before it; they sum to the text's."""
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.diff(np.concatenate([[0], sizes.cumsum()])[ends], prepend=0)


def pack(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, for_scoring: bool = False
) -> datasets.Dataset:
    """Tokenises, joins and cuts into blocks of `max_length` tokens.

    No special tokens but the tokenizer's eos, if it has one, after each document.

    Args:
        texts: rows of `text`, and of `end` where texts are pieces of documents.
        tokenizer: any; with `for_scoring` one of the fast ones.
        max_length: tokens of a block.
        for_scoring: join all texts, keep the last, shorter block if it has at least 2 tokens, and count bytes;
            otherwise every 1000 texts are joined on their own and what does not fill a block is dropped.

    Returns:
        Rows of `input_ids` and `labels` (the same), or with `for_scoring` of `input_ids` and `num_bytes`, the UTF-8
        bytes of the text that each token stands for: they sum to the text's, and an eos has 0.
    """
    if for_scoring and not tokenizer.is_fast:
        raise UserError("the model's tokenizer is not a fast one, which is needed to count bytes: convert it")
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenise(batch):
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_offsets_mapping=for_scoring, verbose=False)
        ends = batch["end"] if "end" in batch else [True] * len(batch["text"])
        ids = list(
            chain.from_iterable(tokens + eos * end for tokens, end in zip(encoded["input_ids"], ends, strict=True))
        )
        starts = range(0, len(ids) - (1 if for_scoring else max_length - 1), max_length)
        blocks = {"input_ids": [ids[i : i + max_length] for i in starts]}
        if not for_scoring:
            return blocks | {"labels": blocks["input_ids"]}
        sizes = chain.from_iterable(
            [*_token_bytes(text, offsets), *[0] * len(eos * end)]
            for text, offsets, end in zip(batch["text"], encoded["offset_mapping"], ends, strict=True)
        )
        sizes = list(sizes)
        return blocks | {"num_bytes": [sizes[i : i + max_length] for i in starts]}

    return texts.map(
        tokenise,
        batched=True,
        batch_size=None if for_scoring else 1000,
        remove_columns=texts.column_names,
        desc="tokenising",
    )


def _has_assistant_mask(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks what the assistant says.

    Raises:
        UserError: if there is no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template, which 'messages' need: save chat_template.jinja beside it, or "
            "name a text_column"
        )
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None
    return marked and tokenizer.is_fast


def pack_conversations(
    conversations: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Renders conversations by the tokenizer's chat template, joins them and cuts into blocks of `max_length` tokens.

    The loss is on what the assistant says, where the template marks that by `{% generation %}` and the tokenizer is a fast
    one. Otherwise it is on all tokens, with a warning.

    Args:
        conversations: rows of `messages`.
        tokenizer: one with a chat template.
        max_length: tokens of a block.

    Returns:
        Rows of `input_ids` and `labels`, -100 where there is no loss. Every 1000 conversations are joined on their own;
        what does not fill a block is dropped, and so is a block without any loss.

    Raises:
        UserError: if there is no chat template, or it cannot render a conversation.
    """
    masked = _has_assistant_mask(tokenizer)
    if not masked:
        logger.warning(
            "The loss is on ALL tokens of the conversations, the user's too: the tokenizer's chat template does not mark "
            "what the assistant says. Put {% generation %} ... {% endgeneration %} around it for a loss on that alone."
        )

    def tokenise(batch):
        ids, labels = [], []
        for messages in batch["messages"]:
            try:
                encoded: Any = tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=masked
                )
            except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
                raise UserError(f"the chat template cannot render the messages {messages!r:.200}: {error}") from error
            tokens = encoded["input_ids"]
            mask = encoded["assistant_masks"] if masked else [1] * len(tokens)
            ids += tokens
            labels += [token if counts else -100 for token, counts in zip(tokens, mask, strict=True)]
        starts = range(0, len(ids) - max_length + 1, max_length)
        # a block's first token is predicted from nothing
        starts = [i for i in starts if any(label != -100 for label in labels[i + 1 : i + max_length])]
        return {
            name: [row[i : i + max_length] for i in starts] for name, row in [("input_ids", ids), ("labels", labels)]
        }

    return conversations.map(
        tokenise, batched=True, remove_columns=conversations.column_names, desc="rendering conversations"
    )


def _parts(
    documents: datasets.Dataset, eval_fraction: float, seed: int
) -> tuple[dict[str, datasets.Dataset], Callable[..., datasets.Dataset]]:
    """What to train on and what to hold out, and what packs it."""
    packer = pack_conversations if "messages" in documents.column_names else pack
    pieces = documents if packer is pack_conversations else cut_documents(documents)
    if not eval_fraction:
        return {"training": pieces}, packer
    return dict(zip(("training", "held-out"), hold_out(pieces, eval_fraction, seed), strict=True)), packer


def load_and_pack(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, eval_fraction: float, seed: int
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset]]:
    """Blocks to train on, of all domains, and held-out blocks of each domain.

    Raises:
        UserError: if a part of a domain does not fill a block.
    """
    train, held_out = [], {}
    for name, documents in args.load(conversations=True).items():
        parts, packer = _parts(documents, eval_fraction, seed)
        blocks = {part: packer(pieces, tokenizer, args.max_length) for part, pieces in parts.items()}
        for part, rows in blocks.items():
            if len(rows) == 0:
                raise UserError(
                    f"max_length {args.max_length} is more than the {part} text of domain {name!r} has tokens to learn: "
                    "lower it"
                )
        train.append(blocks["training"])
        held_out |= {name: blocks["held-out"]} if eval_fraction else {}
    return datasets.concatenate_datasets(train), held_out
