# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How a model was made, as the records in its folder tell: `conversion.json`, `finetuning.json` and `scores.json`."""

from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.lineage import CONVERSION, FINETUNING, lineage_of, recorded_lineage
from ..utils.locations import read_json


SCORES = "scores.json"
# of the options of upcycling, conversion and resizing
TOLD = (
    *("method", "mode", "num_experts", "num_experts_per_tok", "granularity", "scaling", "shared_expert", "noise"),
    *("router_init", "factor", "keep", "score", "seed"),
)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


# what a card can be told, and how: a test, and its meaning
KINDS = {
    **dict.fromkeys(("repo_id", "license", "license_name", "license_link"), (_is_text, "a text")),
    "language": (lambda value: _is_text(value) or _is_texts(value), "a text or a list of texts"),
    **dict.fromkeys(("base_model", "tags"), (_is_texts, "a list of texts")),
    **dict.fromkeys(("upcycling", "training", "metrics"), (_is_table, "an object")),
}


def check_told(told: Any, where: str | Path) -> None:
    """Refuses what cannot be told to a card.

    Args:
        told: as [`history`] returns it.
        where: it comes from, for the message.

    Raises:
        UserError: names what is of another type than it must be.
    """
    if not isinstance(told, dict):
        raise UserError(f"{where} is damaged: it tells a {type(told).__name__} where an object belongs")
    for name, value in told.items():
        if name not in KINDS:
            raise UserError(f"{where} is damaged: it tells {name}, which no card has")
        holds, meaning = KINDS[name]
        if not holds(value):
            raise UserError(f"{where} is damaged: its {name} is {value!r:.100}, which must be {meaning}")


def history(folder: Path) -> dict[str, Any]:
    """What the records say, in the words of [`~modeling_moe.hub.write_model_card`].

    Args:
        folder: of a saved model or adapter.

    Returns:
        Those that are known of `base_model` (a list), `license`, `license_name`, `license_link`, `language`, `upcycling`,
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
        told = ("method", "data", "steps", "tokens", "learning_rate", "seed")
        known["training"] = {name: finetuning[name] for name in told if finetuning.get(name) not in (None, {}, "")}
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
    check_told(known, folder)
    return known


def _conversion(record: dict[str, Any]) -> dict[str, Any]:
    recipe = record.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    options = recipe.get("options")
    told = {name: options[name] for name in TOLD if options.get(name) is not None} if isinstance(options, dict) else {}
    sources = recipe.get("sources")
    sources = sources if isinstance(sources, list) else [recipe.get("source")]
    names = [source["name"] for source in sources if isinstance(source, dict) and isinstance(source.get("name"), str)]
    return {"from": names, "target": recipe.get("target"), **told} if names or told else {}
