# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How a model was made, as the records in its folder tell: `conversion.json`, `finetuning.json` and `scores.json`."""

from pathlib import Path
from typing import Any

from ..utils.lineage import CONVERSION, FINETUNING, lineage_of, recorded_lineage
from ..utils.locations import read_json


SCORES = "scores.json"
# of the options of upcycling, conversion and resizing
TOLD = (
    *("method", "mode", "num_experts", "num_experts_per_tok", "granularity", "scaling", "shared_expert", "noise"),
    *("router_init", "factor", "keep", "score", "seed"),
)


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
    if not bases and adapter.is_file() and (base := read_json(adapter).get("base_model_name_or_path")):
        parent = lineage_of(base) if Path(base).is_dir() else {}
        bases = [parent.pop("base_model", base)]
        known = parent | known
    if (folder / SCORES).is_file():
        known["metrics"] = read_json(folder / SCORES)
    return known | ({"base_model": bases} if bases else {})


def _conversion(record: dict[str, Any]) -> dict[str, Any]:
    recipe = record.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    options = recipe.get("options")
    told = {name: options[name] for name in TOLD if options.get(name) is not None} if isinstance(options, dict) else {}
    sources = recipe.get("sources") or [recipe.get("source")]
    names = [source["name"] for source in sources if isinstance(source, dict) and isinstance(source.get("name"), str)]
    return {"from": names, "target": recipe.get("target"), **told} if names or told else {}
