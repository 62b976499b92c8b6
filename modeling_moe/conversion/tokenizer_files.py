# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives a converted folder a tokenizer that behaves as the source's tokenizer does.

transformers chooses a tokenizer's class by `model_type` if the files name none, and for some model types even if they do.
Copied files alone may therefore load as another tokenizer, or not at all.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..utils.errors import UserError
from ..utils.loading import load_tokenizer
from .older_names import name_tokenizer_for_older_readers


logger = logging.get_logger(__name__)
# text with the spaces, digits, line ends, scripts and bytes on which tokenizers differ
PROBE = "A router's  choice: isn't it 12345?\n\n\tÜber naïve 漢字 \U0001f600 <unk>"
# a tokenizer has one of these files; without them, transformers makes an empty tokenizer for some classes
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
# files that are deleted before a tokenizer is saved again, which writes their content into other files
STALE = ("special_tokens_map.json", "added_tokens.json")


def behaviour(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns everything by which a user can distinguish two tokenizers, except the name of the class.

    Args:
        tokenizer: tokenizer of any class.

    Returns:
        Vocabulary, special tokens, settings, and the encoding of a text that contains every special token.
    """
    specials = sorted(str(token) for token in tokenizer.all_special_tokens)
    ids = tokenizer(PROBE + " ".join(specials)).input_ids
    return {
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special ids": sorted(set(tokenizer.all_special_ids)),
        "chat template": tokenizer.chat_template,
        "padding side": tokenizer.padding_side,
        "truncation side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
        "token ids": ids,
        "token ids without special tokens": tokenizer(PROBE, add_special_tokens=False).input_ids,
        "decoded text": tokenizer.decode(ids),
    }


def differences(expected: PreTrainedTokenizerBase, folder: Path, trust_remote_code: bool = False) -> list[str]:
    """Returns the names of the properties in which the tokenizer in `folder` differs; all of them if none can be loaded."""
    wanted = behaviour(expected)
    try:
        found = behaviour(load_tokenizer(str(folder), trust_remote_code=trust_remote_code))
    except UserError:
        return list(wanted)
    return [name for name in wanted if wanted[name] != found[name]]


def keep_tokenizer(
    source: Path,
    folder: Path,
    gguf_file: str | None = None,
    older_readers: bool = False,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Saves the source's tokenizer again if the copied files would load as another one.

    Args:
        source: folder of the model that was converted.
        folder: folder of the result, with config.json and copies of the tokenizer's files.
        gguf_file: name of the GGUF file in `source` that holds the tokenizer, if it is one.
        older_readers: whether to write the names that transformers 4 reads.
        trust_remote_code: whether code that the source's tokenizer brings may run.
    """
    if not gguf_file and not any(file for pattern in VOCABULARIES for file in source.glob(pattern)):
        return
    try:
        expected = load_tokenizer(str(source), gguf_file, trust_remote_code=trust_remote_code)
    except UserError as error:
        logger.warning(f"The tokenizer's files of {source} were copied, but do not load: {error}")
        return
    if older_readers:
        name_tokenizer_for_older_readers(folder)
    if not differences(expected, folder, trust_remote_code):
        return
    for name in STALE:
        (folder / name).unlink(missing_ok=True)
    expected.save_pretrained(folder)
    if older_readers:
        name_tokenizer_for_older_readers(folder)
    if changed := differences(expected, folder, trust_remote_code):
        logger.warning(f"The tokenizer in {folder} is not that of {source}: it differs in {', '.join(changed)}.")
