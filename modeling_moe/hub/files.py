# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Of the files in a folder, those that belong to the model are published, and no other."""

import re
from pathlib import Path

from ..cli import UserError
from ..utils.locations import leads_outside, read_json
from ..utils.trust import code_files


CARD = "README.md"
BELONGING = (
    *(CARD, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md", "USE_POLICY.md"),
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("conversion.json", "finetuning.json", "scores.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
TEMPLATES = "additional_chat_templates"
# transformers and PEFT read the first of each group that is there
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("adapter_model.safetensors", "adapter_model.bin"),
)
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


def _weights(folder: Path) -> list[str]:
    names = []
    for group in WEIGHTS:
        first = next((name for name in group if (folder / name).is_file()), None)
        if first is None:
            continue
        names.append(first)
        if first.endswith(".index.json"):
            names += sorted(set(read_json(folder / first)["weight_map"].values()))
    return names


def _pictures(card: str) -> list[str]:
    """The paths of pictures that a card shows, as Markdown or HTML has them."""
    shown = re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", card) + re.findall(r"<img[^>]*\ssrc=[\"']([^\"']+)[\"']", card)
    plain = [path.removeprefix("./") for path in shown if path.lower().endswith(PICTURES) and "\\" not in path]
    return [path for path in plain if not path.startswith("/") and ".." not in path.split("/") and ":" not in path]


def published_files(folder: str | Path, card: str | None = None) -> tuple[list[str], list[str]]:
    """The files of a folder that a push uploads, and those that it leaves out.

    Args:
        folder: of a model or an adapter.
        card: text of the card that will be uploaded; that of the folder's README.md if None.

    Returns:
        Names relative to the folder: weights, code, configuration, tokenizer, card, license, records of how the model
        was made, and the pictures that the card shows; and the names of all other files.

    Raises:
        UserError: if a file to upload is a link that leads outside the folder, or the weights lack a file.
    """
    folder = Path(folder)
    if card is None and (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8")
    weights = _weights(folder)
    if lacking := [name for name in weights if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {lacking[0]}, which its index names: restore it")
    templates = [f"{TEMPLATES}/{file.name}" for file in sorted((folder / TEMPLATES).glob("*.jinja"))]
    wanted = {*BELONGING, *weights, *templates, *code_files(folder), *_pictures(card or "")}
    files = sorted(name for name in wanted if (folder / name).is_file())
    for name in files:
        if leads_outside(folder / name, folder):
            raise UserError(f"{folder / name} is a link that leads outside the folder: put the file itself there")
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() or file.is_symlink()}
    return files, sorted(there - set(files))
