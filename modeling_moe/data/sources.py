# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads files, folders and datasets as rows of text, of conversations, or of prompts with completions."""

import codecs
import os
import re
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from huggingface_hub.errors import HfHubHTTPError

from ..utils.errors import UserError
from .tables import one_table


TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PROSE = {".md", ".rst"}
CODE_NAMES = (
    "py pyi ipynb c h cc cpp cxx hpp cu cuh rs go java kt scala swift cs js jsx ts tsx vue rb php pl lua "
    "r jl hs ml clj ex erl dart zig nim f90 m sh bash zsh ps1 sql tf proto css"
)
CODE = {f".{name}" for name in CODE_NAMES.split()}
KINDS = ".txt, .md, .rst, source code, .json, .jsonl, .csv, .tsv or .parquet"
BOM = b"\xef\xbb\xbf"
JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
MAX_DEPTH = 100  # levels of nesting; Arrow supports fewer, and its reader crashes at some thousands
SKIPPED = {"__pycache__", "node_modules"}
# the prompt of Stanford Alpaca, for an instruction without a chat template
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)
READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    TypeError,
    StopIteration,
    HfHubHTTPError,
    datasets.exceptions.DatasetsError,
)


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in TABLES or suffix == ".txt":
        return suffix.replace("jsonl", "json")
    return "prose" if suffix in PROSE else "code" if suffix in CODE else ""


def _folder_files(folder: Path) -> list[Path]:
    """Returns the data files of a folder, which must be of one kind."""
    by_kind: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") or part in SKIPPED for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden and (kind := _kind(file)):
            by_kind.setdefault(kind, []).append(file)
    code, prose = by_kind.pop("code", []), by_kind.pop("prose", [])
    if code:
        code += prose + by_kind.pop(".txt", [])
        if all(file.suffix.lower() == ".json" for file in by_kind.get(".json", [])):
            # a package.json beside a program is not data
            by_kind.pop(".json", None)
    kinds = [*by_kind, *(["source code"] if code else [])]
    if len(kinds) > 1:
        raise UserError(
            f"data {folder} holds files of several kinds ({', '.join(kinds)}): give each kind its own domain, with a folder "
            f"or a pattern such as '{folder}/**/*.txt'"
        )
    files = sorted(code) or next(iter(by_kind.values()), prose)
    if not files:
        raise UserError(f"data {folder} is a folder without a {KINDS} file: convert the data, or name another folder")
    return files


def _local_files(source: str) -> list[Path]:
    """Returns the files that a path or a pattern names on this machine, or an empty list."""
    source = os.path.expanduser(source)
    path = Path(source)
    if path.is_dir():
        return _folder_files(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"data {source} is a device or a pipe, which may never end: save the data in a file")
    if not has_magic(source):
        return []
    files = sorted(Path(file) for file in glob(source, recursive=True) if os.path.isfile(file))
    if not files:
        raise UserError(f"data {source} matches no file: correct the pattern")
    kinds = {_kind(file) if file.suffix.lower() in TABLES else "text" for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"data {source} matches files of several kinds ({', '.join(sorted(kinds))}): narrow the pattern"
        )
    return files


def _read_text(file: Path) -> str:
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data {file} is not text in UTF-8: convert it, {error}") from error
    if "\0" in text:
        raise UserError(f"data {file} is binary, since it has zero bytes: name a {KINDS} file")
    return text


def _check_encoding(file: Path) -> None:
    """Refuses a file that is not UTF-8, which pyarrow would accept.

    Raises:
        UserError: if the file is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as stream:
        try:
            while part := stream.read(1 << 20):
                decoder.decode(part)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise UserError(f"data {file} is not text in UTF-8: convert it, {error}") from error


def _check_json(file: Path) -> None:
    """Refuses JSON whose rows are not objects; at a null, pyarrow's reader may end the process.

    Raises:
        UserError: if a line of a .jsonl file is not an object, or another file begins with neither an object nor a
            list.
    """
    with file.open("rb") as stream:
        head = stream.read(1 << 16).removeprefix(BOM).lstrip()
        wrong, number = head, 1
        if head.startswith(b"["):
            wrong = head[1:].lstrip()
            known = wrong[:1] in (b"{", b'"')  # a list of texts becomes rows of `text`
        elif file.suffix.lower() == ".jsonl":
            stream.seek(0)
            lines = ((number, line.removeprefix(BOM).strip()) for number, line in enumerate(stream, start=1))
            number, wrong = next(((number, line) for number, line in lines if line[:1] not in (b"", b"{")), (1, b""))
            known = not wrong
        else:
            known = head[:1] in (b"", b"{")
    if not known:
        shown = wrong[:40].decode(errors="replace")
        raise UserError(f"data {file} has {shown!r} in line {number}: give one object such as {{'text': ...}} a row")


def _check_depth(file: Path) -> None:
    """Refuses deeply nested JSON, at which pyarrow's reader would end the process.

    Raises:
        UserError: if lists and objects are nested more than `MAX_DEPTH` deep.
    """
    depth, rows = 0, file.suffix.lower() == ".jsonl"
    with file.open("rb") as stream:
        for line in stream:
            if rows and line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
                continue
            codes = np.frombuffer(JSON_TEXT.sub(b"", line), np.uint8)
            opens = np.isin(codes, (ord("["), ord("{")))
            steps = opens.astype(int)[marks := opens | np.isin(codes, (ord("]"), ord("}")))] * 2 - 1
            depths = (0 if rows else depth) + steps.cumsum()
            if marks.any() and depths.max() > MAX_DEPTH:
                raise UserError(f"data {file} is nested more than {MAX_DEPTH} deep: give rows of text or messages")
            depth = int(depths[-1]) if marks.any() else depth


def _check_header(file: Path, sep: str) -> None:
    """Refuses two columns of one name, and a first row with more fields than the header, which pandas would shift.

    Raises:
        UserError: if the header or the first row is wrong.
    """
    try:
        names = pd.read_csv(file, sep=sep, header=None, nrows=2, dtype=str, keep_default_na=False).iloc[0]
    except pd.errors.ParserError as error:
        raise UserError(f"data {file}: the first row does not fit the header: {error}") from error
    if len(twice := names[names.duplicated()]):
        raise UserError(f"data {file} names the column {twice.iloc[0]!r} twice: rename one")


def _read_table(files: list[Path]) -> datasets.Dataset:
    builder = TABLES[files[0].suffix.lower()]
    options: dict[str, Any] = {}
    if not any(file.stat().st_size for file in files):
        raise UserError(f"data {files[0]} is empty: give a file with rows")
    files = [file for file in files if file.stat().st_size]
    for file in files if builder != "parquet" else []:
        _check_encoding(file)
        if builder == "json":
            _check_json(file)
            _check_depth(file)
    if builder == "csv":
        # pandas would read the texts "None" and "NA" as missing
        options = {"sep": "\t" if files[0].suffix.lower() == ".tsv" else ",", "keep_default_na": False}
        for file in files:
            _check_header(file, options["sep"])
    return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)


def read(source: str, text_column: str, split: str) -> datasets.Dataset:
    """Reads the rows of a source with all columns; text files give one column, `text_column`.

    Raises:
        UserError: if the source does not exist or cannot be read.
    """
    files = _local_files(source)
    if not files and (Path(source).suffix.lower() in {*TABLES, ".txt", *PROSE, *CODE} or source[0] in "./~"):
        raise UserError(f"data {source} does not exist: correct the path")
    try:
        if files and files[0].suffix.lower() in TABLES:
            return _read_table(files)
        if files:
            return datasets.Dataset.from_dict({text_column: [_read_text(file) for file in files]})
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, split=split)
    except UserError:
        raise
    except READ_ERRORS as error:
        cause = error.__cause__ or error
        reason = "it has no rows" if "corresponds to no data" in str(cause) else str(cause) or type(cause).__name__
        raise UserError(f"data {source} cannot be read as files or a dataset on the Hub: {reason}") from error


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_list(feature: Any) -> bool:
    # datasets uses `Json` for dicts of different keys; older releases lack it
    return isinstance(feature, (list, datasets.List, datasets.LargeList, getattr(datasets, "Json", list)))


def _instructions(rows: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    """Returns rows with `messages` for a chat template, and with `prompt` and `completion` for tokenizers without one."""

    def convert(row: dict) -> dict:
        task, answer = (row[columns[name]] for name in ("instruction", "output"))
        context = row[columns["input"]] if "input" in columns else None
        user = f"{task}\n\n{context}" if context else task
        lead = ", paired with an input that provides further context" if context else ""
        return {
            "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
            "prompt": ALPACA.format(lead, task, f"### Input:\n{context}\n\n" if context else ""),
            "completion": answer,
        }

    full = one_table(rows.filter(lambda *cells: all(cells), input_columns=[columns["instruction"], columns["output"]]))
    return one_table(full.map(convert, remove_columns=full.column_names))


def _chats(rows: datasets.Dataset, messages_column: str | None) -> datasets.Dataset | None:
    """Returns the rows of a known conversation format, or None for other rows."""
    features = rows.features
    tools = ["tools"] * ("tools" in features)
    for column in [messages_column] if messages_column else ["messages", "conversations"]:
        if _is_list(features.get(column)):
            system = ["system"] * (column != "messages" and _is_text(features.get("system")))
            chats = one_table(rows.select_columns([column, *system, *tools]))
            chats = chats if column == "messages" else chats.rename_column(column, "messages")
            return one_table(chats.filter(bool, input_columns="messages"))
    pair = ["prompt", "completion"]
    if all(_is_list(features.get(name)) for name in pair) or all(_is_text(features.get(name)) for name in pair):
        pairs = one_table(rows.select_columns([*pair, *tools]))
        filled = pairs.filter(lambda prompt, completion: prompt is not None and bool(completion), input_columns=pair)
        return one_table(filled)
    names = {"instruction": ["instruction"], "output": ["output", "response"], "input": ["input", "context"]}
    found = {name: [alias for alias in aliases if _is_text(features.get(alias))] for name, aliases in names.items()}
    columns = {name: aliases[0] for name, aliases in found.items() if aliases}
    return _instructions(rows, columns) if {"instruction", "output"} <= columns.keys() else None


def load_documents(
    source: str, text_column: str | None = None, split: str = "train", conversations: bool = False
) -> datasets.Dataset:
    """Loads the documents of a source. A text file is one document; of other files, each row is one.

    Args:
        source: path of a file, path of a folder of files of one kind, or a pattern such as `src/**/*.py`; or `name` or
            `name:config` of a dataset on the Hub. Text files are .txt, .md, .rst and source code, in UTF-8; tables are
            .json, .jsonl, .csv, .tsv and .parquet.
        text_column: column with the text, in tables; the default is `text`. With `conversations` it may hold messages.
        split: split of a dataset on the Hub.
        conversations: use columns with conversations if they exist and `text_column` is not given: `messages` (role
            and content), `conversations` (ShareGPT: from and value), `prompt` and `completion`, or `instruction`,
            `input` and `output` (Alpaca).

    Returns:
        Rows without empty ones, of one of these kinds: `text`; `messages`, each a list of dicts, optionally with
        `tools` and `system`; `prompt` and `completion`, both texts or both lists of messages; for Alpaca `messages`,
        `prompt` and `completion`, of which the last two serve a tokenizer without a chat template.

    Raises:
        UserError: if the source does not exist, lacks the column, or holds no text.
    """
    documents = read(source, text_column or "text", split)
    chats = None
    if conversations and (text_column is None or _is_list(documents.features.get(text_column))):
        chats = _chats(documents, text_column)
    documents = _texts(documents, source, text_column or "text", conversations) if chats is None else chats
    if len(documents) == 0:
        raise UserError(f"data {source} holds no text: give a source with text")
    return documents


def _texts(documents: datasets.Dataset, source: str, text_column: str, conversations: bool) -> datasets.Dataset:
    if text_column not in documents.column_names:
        columns = ", ".join(documents.column_names)
        known = ", or rename columns to messages, prompt and completion, or instruction and output" * conversations
        raise UserError(f"text_column {text_column!r} is not in {source}: choose one of {columns}{known}")
    feature = documents.features[text_column]
    if getattr(feature, "dtype", None) == "null":
        raise UserError(f"data {source} holds no text: every row of {text_column!r} is null")
    if not _is_text(feature):
        raise UserError(f"text_column {text_column!r} of {source} holds {feature}: choose a column of text")
    documents = one_table(documents.select_columns(text_column))
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    return one_table(documents.filter(lambda text: bool(text), input_columns="text"))
