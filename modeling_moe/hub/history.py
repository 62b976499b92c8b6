# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads from `conversion.json`, `finetuning.json` and `scores.json` how a model was made."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.lineage import CONVERSION, FINETUNING, VERIFICATION, lineage_of, recorded_lineage
from .wording import without_paths


SCORES = "scores.json"
# options of upcycling that a card shows: of feed-forward networks, of attention, and of both
NETWORK_OPTIONS = ("method", "num_experts", "num_experts_per_tok", "granularity", "scaling", "shared_expert")
ATTENTION_OPTIONS = ("attention_experts", "attention_experts_per_tok")
SHOWN_OPTIONS = ("noise", "router_init", "seed")
# method of resizing -> options that it reads and a card shows
RESIZING = {
    "grow": ("mode", "factor", "num_experts", "noise", "seed"),
    "prune": ("keep", "score"),
    "merge": ("keep", "score"),
    "extract": ("task",),
}
# score by which experts are ranked -> what a card says
SCORE_TEXTS = {
    "reap": "REAP (arXiv:2510.13999): routing weight times norm of the output, averaged over the expert's tokens",
    "load": "number of tokens that are sent to the expert",
    "mass": "routing weight of the expert, averaged over all tokens",
}
# a card lists at most this many ids of kept experts
MAX_IDS = 64


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


CARD_TEXTS = ("repo_id", "license", "license_name", "license_link", "description", "intended_use")
# fields of a card -> type
CARD_FIELDS = {
    **dict.fromkeys(CARD_TEXTS, FieldType(_is_text, "a text")),
    "language": FieldType(lambda value: _is_text(value) or _is_texts(value), "a text or a list of texts"),
    **dict.fromkeys(("base_model", "tags"), FieldType(_is_texts, "a list of texts")),
    **dict.fromkeys(("upcycling", "data", "training", "metrics"), FieldType(_is_table, "an object")),
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
        `data`, `training` and `metrics`.

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
            parent = lineage_of(base) if os.path.isdir(base) else {}
            bases = [parent.pop("base_model", base)]
            known = parent | known
        known["training"] = _training(finetuning)
        if isinstance(sources := finetuning.get("data"), dict) and sources:
            known["data"] = {domain: {"source": source} for domain, source in sources.items()}
        if isinstance(losses := finetuning.get("eval_loss"), dict) and losses:
            known["metrics"] = {domain: {"loss": loss} for domain, loss in losses.items()}
    adapter = folder / "adapter_config.json"
    base = read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else None
    if not bases and isinstance(base, str) and base:
        parent = lineage_of(base) if os.path.isdir(base) else {}
        bases = [parent.pop("base_model", base)]
        known = parent | known
    if (folder / SCORES).is_file():
        known["metrics"] = read_json(folder / SCORES)
    known |= {"base_model": bases} if bases else {}
    check_card_fields(known, folder)
    return known


def _conversion(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the card's rows about upcycling, conversion or resizing from the content of `conversion.json`."""
    recipe = _table(record.get("recipe"))
    options = _table(recipe.get("options"))
    method = str(options.get("method"))
    names = RESIZING.get(method) or _of_upcycling(options)
    shown = {name: options[name] for name in names if options.get(name) is not None}
    sources = recipe.get("sources")
    sources = sources if isinstance(sources, list) else [recipe.get("source")]
    places = [place for source in sources if (place := _place(source)) is not None]
    if not places and not shown:
        return {}
    if method in RESIZING:
        shown = {"method": method, **_resizing(shown, options, _table(recipe.get("kept")))}
    return {"from": places, "target": recipe.get("target"), **shown, "exactness": _exactness(record, recipe)}


def _of_upcycling(options: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of the options of an upcycling that a card shows: those that the result depends on."""
    networks = () if options.get("layers") == "none" else NETWORK_OPTIONS
    return (*networks, *(ATTENTION_OPTIONS if options.get("attention_experts") else ()), *SHOWN_OPTIONS)


def _place(source: object) -> str | None:
    """Returns the name of a source that a recipe describes, with the file of a GGUF; None if there is no name."""
    known = _table(source)
    if not isinstance(name := known.get("name"), str):
        return None
    files = list(_table(known.get("files")))
    return f"{name}/{files[0]}" if len(files) == 1 and str(files[0]).endswith(".gguf") else name


def _resizing(shown: dict[str, Any], options: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Returns the card's rows about resizing.

    Args:
        shown: the options that the method reads.
        options: all options of the recipe.
        kept: ids of the kept experts by layer; empty if the recipe has none.
    """
    if "keep" not in shown:
        # num_experts replaces factor
        return {name: value for name, value in shown.items() if name != "factor" or "num_experts" not in shown}
    rows = {"experts kept in each layer": shown["keep"]}
    rows["experts ranked by"] = SCORE_TEXTS.get(str(shown.get("score")), shown.get("score"))
    if isinstance(data := options.get("data"), list) and data:
        rows["measured on"] = f"{', '.join(map(str, without_paths(data)))}; {options.get('tokens')} tokens of each"
    elif isinstance(usage := options.get("usage_json"), str):
        rows["measured on"] = f"a text whose use of the experts was read from {without_paths(usage)}"
    ids = {layer: experts for layer, experts in kept.items() if isinstance(experts, list)}
    if 0 < sum(map(len, ids.values())) <= MAX_IDS:
        rows["kept experts of the source"] = "; ".join(
            f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in ids.items()
        )
    elif ids:
        rows["kept experts of the source"] = f"listed in {CONVERSION}"
    return rows


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _exactness(record: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """Returns what is known of the difference between the result and its source; None if nothing is."""
    measured = _table(record.get(VERIFICATION))
    parts, difference = [], measured.get("largest_difference")
    if isinstance(reason := recipe.get("reason_not_exact"), str):
        parts.append(f"does not compute the source's function ({reason})")
    if isinstance(difference, float):
        dtype = str(recipe.get("dtype", "")).removeprefix("torch.")
        parts.append(
            f"measured: the logits of result and source differ by at most {difference:.1e} on a text"
            f"{f' in {dtype}' if dtype not in ('', 'auto') else ''}"
        )
    elif not parts and "reason_not_exact" in recipe:
        parts.append("the source's function by construction; not measured")
    return "; ".join(parts) or None


def _training(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the card's rows about training from the content of `finetuning.json`; older files have fewer entries."""
    rows: dict[str, Any] = {name: record.get(name) for name in ("method", "steps")}
    if isinstance(tokens := record.get("tokens"), int):
        rows["tokens"] = f"{tokens:,}"
    sequences, length = record.get("batch_size"), record.get("max_length")
    if isinstance(sequences, int) and isinstance(length, int):
        rows["batch"] = f"{sequences} sequences of {length} tokens"
    rows |= {name: record.get(name) for name in ("learning_rate", "optimizer", "seed")}
    rows |= {name: value for name, value in record.items() if name.startswith(("lora_", "use_rslora"))}
    trained, total = record.get("trained_parameters"), record.get("parameters")
    if isinstance(trained, int) and isinstance(total, int) and total > 0:
        rows["trained_parameters"] = f"{trained:,}, {trained / total:.2%} of the model's {total:,} without an adapter"
    for name, change in _table(record.get("loss")).items():
        if isinstance(change, Mapping) and all(isinstance(change.get(end), int | float) for end in ("first", "last")):
            title = "training loss in nats per token" if name == "loss" else f"router {name.removeprefix('routing/')}"
            rows[f"{title}, mean of the first and last quarter"] = f"{change['first']:.4f}, {change['last']:.4f}"
    return {name: value for name, value in rows.items() if value not in (None, {}, "")}
