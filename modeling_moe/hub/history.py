# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads from `conversion.json`, `finetuning.json` and `scores.json` how a model was made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.lineage import CONVERSION, FINETUNING, lineage_of, recorded_lineage


SCORES = "scores.json"
# options of upcycling, conversion and resizing that a card shows
SHOWN_OPTIONS = (
    *("method", "mode", "num_experts", "num_experts_per_tok", "granularity", "scaling", "shared_expert", "noise"),
    *("router_init", "factor", "keep", "score", "seed"),
)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


class FieldType(NamedTuple):
    """The type of a card's field: a test of values, and a name for messages."""

    accepts: Callable[[Any], bool]
    name: str


# fields of a card -> type
CARD_FIELDS = {
    **dict.fromkeys(("repo_id", "license", "license_name", "license_link"), FieldType(_is_text, "a text")),
    "language": FieldType(lambda value: _is_text(value) or _is_texts(value), "a text or a list of texts"),
    **dict.fromkeys(("base_model", "tags"), FieldType(_is_texts, "a list of texts")),
    **dict.fromkeys(("upcycling", "training", "metrics"), FieldType(_is_table, "an object")),
}


def check_card_fields(fields: object, where: str | Path) -> None:
    """Refuses fields that a card does not have, and values of a wrong type.

    Args:
        fields: dictionary of field names to values, as [`history`] returns it.
        where: folder or file from which the fields were read, for the message.

    Raises:
        UserError: names the field.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{where} is damaged: it holds a {type(fields).__name__} where an object belongs")
    for name, value in fields.items():
        if name not in CARD_FIELDS:
            raise UserError(f"{where} is damaged: it holds {name}, which no card has")
        if not CARD_FIELDS[name].accepts(value):
            raise UserError(
                f"{where} is damaged: its {name} is {value!r:.100}, which must be {CARD_FIELDS[name].name}"
            )


def history(folder: Path) -> dict[str, Any]:
    """Returns the arguments of [`~modeling_moe.hub.write_model_card`] that the records in a folder give.

    Args:
        folder: folder of a saved model or adapter.

    Returns:
        The known ones of `base_model` (a list), `license`, `license_name`, `license_link`, `language`, `upcycling`,
        `training` and `metrics`.

    Raises:
        UserError: if a record is damaged.
    """
    known = recorded_lineage(folder)
    bases = [known.pop("base_model")] if "base_model" in known else []
    if (folder / CONVERSION).is_file() and (made := _conversion(read_json(folder / CONVERSION))):
        known["upcycling"] = made
    if (folder / FINETUNING).is_file():
        finetuning = read_json(folder / FINETUNING)
        base = finetuning.get("base_model")
        if isinstance(base, str) and base and not bases:
            parent = lineage_of(base) if Path(base).is_dir() else {}
            bases = [parent.pop("base_model", base)]
            known = parent | known
        shown = ("method", "data", "steps", "tokens", "learning_rate", "seed")
        known["training"] = {name: finetuning[name] for name in shown if finetuning.get(name) not in (None, {}, "")}
        if isinstance(losses := finetuning.get("eval_loss"), dict) and losses:
            known["metrics"] = {domain: {"loss": loss} for domain, loss in losses.items()}
    adapter = folder / "adapter_config.json"
    base = read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else None
    if not bases and isinstance(base, str) and base:
        parent = lineage_of(base) if Path(base).is_dir() else {}
        bases = [parent.pop("base_model", base)]
        known = parent | known
    if (folder / SCORES).is_file():
        known["metrics"] = read_json(folder / SCORES)
    known |= {"base_model": bases} if bases else {}
    check_card_fields(known, folder)
    return known


def _conversion(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the card's rows about upcycling, conversion or resizing from the content of `conversion.json`."""
    recipe = record.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    options = recipe.get("options")
    options = options if isinstance(options, dict) else {}
    shown = {name: options[name] for name in SHOWN_OPTIONS if options.get(name) is not None}
    sources = recipe.get("sources")
    sources = sources if isinstance(sources, list) else [recipe.get("source")]
    names = [source["name"] for source in sources if isinstance(source, dict) and isinstance(source.get("name"), str)]
    return {"from": names, "target": recipe.get("target"), **shown} if names or shown else {}
