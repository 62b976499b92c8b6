# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This gives a converted folder a tokenizer that does what the source's tokenizer does.

transformers chooses a tokenizer's class by `model_type` where the files name none, and for some model types against what
they name. Copied files alone may therefore load as another tokenizer, or not at all.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..utils.errors import UserError
from ..utils.loading import load_tokenizer
from .older_names import name_tokenizer_for_older_readers


logger = logging.get_logger(__name__)
# spaces, digits, line ends, scripts and bytes on which tokenizers differ
PROBE = "A router's  choice: isn't it 12345?\n\n\tÜber naïve 漢字 \U0001f600 <unk>"
# one of them is there where there is a tokenizer; transformers makes an empty one of some classes without them
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
# a tokenizer that is saved anew says all of this in its own files
STALE = ("special_tokens_map.json", "added_tokens.json")


def behaviour(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a user of a tokenizer can tell it by, the class's name aside.

    Args:
        tokenizer: of any class.

    Returns:
        Vocabulary, special tokens, settings, and what becomes of a text that holds every special token.
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
    """Names what the tokenizer in `folder` does otherwise; all of it if none loads."""
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
    """Saves the source's tokenizer anew where the copied files would load as another one.

    Args:
        source: folder of the model that was converted.
        folder: the result's, with its config.json and with copies of the tokenizer's files.
        gguf_file: name of the GGUF file in `source` that the tokenizer comes from.
        older_readers: name things as transformers 4 does.
        trust_remote_code: run code that the source's tokenizer brings.
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
