# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module selects the files of a folder that belong to the model; only they are published."""

import re
from pathlib import Path

from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.locations import leads_outside
from ..utils.prediction_files import prediction_files
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
# transformers and PEFT read the first of these files that exists
WEIGHTS = {
    "model": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
}
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


def _weights(folder: Path) -> list[str]:
    """Returns the names of the files of weights, an index and layers that predict further tokens included.

    Raises:
        UserError: if an index names a file that is not a file of weights.
    """
    kind = "model" if (folder / "config.json").is_file() else "adapter"
    first = next((name for name in WEIGHTS[kind] if (folder / name).is_file()), None)
    further = prediction_files(folder) if kind == "model" else []
    if further and first == "model.safetensors":
        # without an index, vLLM and SGLang would read the further files too
        first = f"{first}.index.json"
    if first is None or not first.endswith(".index.json"):
        return [first, *further] if first else []
    if not (folder / first).is_file():
        raise UserError(f"{folder} lacks {first}, without which servers load {further[0]} too: restore it")
    shards = sorted(set(read_json(folder / first)["weight_map"].values()))
    ending = first.removesuffix(".index.json").rpartition(".")[2]
    if strange := [name for name in shards if not name.endswith(f".{ending}")]:
        raise UserError(f"{folder / first} names {strange[0]}, which is no file of weights: download both again")
    return [first, *shards, *further]


def _pictures(card: str) -> list[str]:
    """Returns relative paths of the pictures that a card shows in Markdown or HTML; hidden files are left out."""
    shown = re.findall(r"!\[[^\]]{0,500}\]\(\s*<?([^)\s>]+)", card)
    shown += re.findall(r"<img[^>]{0,500}?\ssrc=[\"']([^\"']+)[\"']", card)
    plain = [path.removeprefix("./") for path in shown if path.lower().endswith(PICTURES) and "\\" not in path]
    return [path for path in plain if ":" not in path and not any(part[:1] in ("", ".") for part in path.split("/"))]


def _refuse_links(folder: Path, files: list[str]) -> None:
    """Refuses a link that leads outside the folder, or to a file that is not published itself."""
    for name in files:
        file = folder / name
        if leads_outside(file, folder):
            raise UserError(f"{file} is a link that leads outside the folder: put the file itself there")
        real = file.resolve()
        if real.is_relative_to(folder.resolve()) and real.relative_to(folder.resolve()).as_posix() not in files:
            raise UserError(f"{file} is a link to {real.name}, which is not published: put the file itself there")


def published_files(folder: str | Path, card: str | None = None) -> tuple[list[str], list[str]]:
    """Returns the files of a folder that a push uploads, and the files that it leaves out.

    Args:
        folder: folder of a model or an adapter.
        card: text of the card that will be uploaded; the text of the folder's README.md if None.

    Returns:
        Names relative to the folder: first weights, code, configuration, tokenizer, card, license, records of how the
        model was made, and pictures that the card shows; then all other files.

    Raises:
        UserError: if a file to upload is a link to a file that is not uploaded, or a file of weights is missing.
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
    _refuse_links(folder, files)
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() or file.is_symlink()}
    return files, sorted(there - set(files))
