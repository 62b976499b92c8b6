# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the model card: metadata, facts, how the model was made, results, and how to load it."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..utils.errors import UserError
from .facts import has_chat_template, model_facts
from .history import check_card_fields, history
from .wording import markdown_text, without_paths


TEMPLATE = Path(__file__).with_name("card.md.jinja")
MEASURES = {"loss": "Loss", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# a card that this module wrote ends with this line: the hash of the text before it, and the card's fields as JSON in base64
MARK = re.compile(r"<!-- modeling_moe card ([0-9a-f]{64}) ([A-Za-z0-9+/=]+) -->\n?\Z")
# PEFT's empty card contains these texts
PEFT_CARD = ("# Model Card for Model ID", "[More Information Needed]")


def write_model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    upcycling: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    tags: Sequence[str] = ("moe", "modeling_moe"),
) -> ModelCard:
    """Writes `README.md` into the folder of a saved model or LoRA adapter, without using the network.

    Arguments that are not given are taken from `conversion.json`, `finetuning.json` and `scores.json` in the folder.

    Args:
        folder: folder in which `save_pretrained` wrote the model; the facts come from config.json there.
        repo_id: name on the Hub, for title and code example; the folder's name if not given.
        base_model: checkpoint(s) from which the model was made. Names on the Hub become metadata; the card shows only
            the last part of a local path.
        language: metadata of the card; left out if not known.
        license: the Hub's identifier, such as `apache-2.0` or `llama3.2`; left out if not known.
        metrics: results of each domain, `{"wiki": {"loss": ..., "perplexity": ..., "bits_per_byte": ...}}`, any of the
            three; or before and after training, `{"wiki": {"before": {...}, "after": {...}}}`.
        upcycling: names and values that describe how the dense model became sparse.
        training: names and values that describe how the model was trained afterwards.
        tags: metadata of the card.

    Returns:
        The card that was written.

    Raises:
        UserError: if the folder holds no model, a record is damaged, the license is no identifier, or the metrics of a
            domain contain none of the three measures.
    """
    folder = Path(folder)
    given = {
        "repo_id": repo_id,
        "base_model": [base_model] if isinstance(base_model, str) else list(base_model or []),
        "language": language,
        "license": license,
        "metrics": metrics,
        "upcycling": upcycling,
        "training": training,
        "tags": list(tags),
    }
    card = ModelCard(_card_text(folder, _non_empty(given)))
    (folder / "README.md").write_text(card.content, encoding="utf-8")
    return card


def card_to_publish(
    folder: Path,
    *,
    repo_id: str,
    base_model: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    trust_remote_code: bool = False,
) -> str | None:
    """Returns the text of the card to publish under a name; nothing is written.

    Args:
        folder: folder of a model or adapter.
        repo_id: name on the Hub.
        base_model: Hub name of the base model; a field that is not given keeps the value of an earlier card.
        language: metadata of the card.
        license: the Hub's identifier of the license.
        metrics: results, as in [`write_model_card`].
        trust_remote_code: whether code that the folder brings may read the model's configuration.

    Returns:
        The text; None if somebody else wrote or edited the folder's card, which is then published unchanged.

    Raises:
        UserError: as [`write_model_card`].
    """
    earlier: dict[str, Any] = {}
    file = folder / "README.md"
    if file.is_file() and (text := file.read_text(encoding="utf-8")).strip():
        mark = MARK.search(text)
        if mark is not None and mark[1] == _hash(text[: mark.start()]):
            earlier = _fields_of_mark(mark[2])
        if not earlier and not all(part in text for part in PEFT_CARD):
            return None
    given = {
        "base_model": [base_model] if base_model else None,
        "language": language,
        "license": license,
        "metrics": metrics,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return _card_text(folder, _non_empty(earlier | given | {"repo_id": repo_id}), trust_remote_code)


def reason_without_license(card: str | None) -> str | None:
    """Returns a sentence if a card of this module names no license; None if it does, or if the card is the user's own."""
    if card is None or ModelCard(card).data.to_dict().get("license"):
        return None
    return "the license of the base model is recorded nowhere: pass --license, such as apache-2.0 or llama3.2"


def _fields_of_mark(mark: str) -> dict[str, Any]:
    """Returns the fields that the last line of an earlier card holds; empty if this module did not write the line."""
    try:
        fields = json.loads(base64.b64decode(mark, validate=True))
        check_card_fields(fields, "the card")
    except (ValueError, RecursionError):
        return {}
    return fields


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _non_empty(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are not empty, in JSON's types and without paths of this machine."""
    fields = {name: value for name, value in given.items() if value not in (None, [], {}, "")}
    return {name: value if name == "repo_id" else without_paths(value) for name, value in fields.items()}


def _card_text(folder: Path, fields: Mapping[str, Any], trust_remote_code: bool = False) -> str:
    """Renders the card; fields that are not given come from the records in the folder."""
    facts = model_facts(folder, trust_remote_code)
    known = history(folder) | {name: value for name, value in fields.items() if name != "repo_id"}
    name = fields.get("repo_id") or folder.resolve().name
    license = known.get("license")
    if license is not None and not (isinstance(license, str) and LICENSE.fullmatch(license)):
        raise UserError(f"license {license!r} is no identifier of the Hub: write it like apache-2.0, or other")
    sources = known.get("base_model") or []
    results = _results(known.get("metrics") or {})
    data = ModelCardData(
        language=known.get("language"),
        license=license,
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=known.get("tags") or ["moe", "modeling_moe"],
        base_model=[source for source in sources if is_hub_name(source)] or None,
        model_name=markdown_text(name).rpartition("/")[2] if results else None,
        eval_results=_eval_results(results, facts.task) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        title=markdown_text(name),
        has_code=(folder / "modeling_moe.py").is_file(),
        chats=has_chat_template(folder),
        sources=[markdown_text(source) for source in sources],
        upcycling=_rows(known.get("upcycling")),
        training=_rows(known.get("training")),
        results=_table(results),
        compared=any("before" in stages for stages in results.values()),
        **vars(facts),
    )
    text = card.content.rstrip("\n") + "\n\n"
    code = base64.b64encode(json.dumps(dict(fields)).encode()).decode()
    return f"{text}<!-- modeling_moe card {_hash(text)} {code} -->\n"


def is_hub_name(name: str) -> bool:
    """Returns whether a text is a Hub name `owner/name` rather than a path on this machine."""
    if name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _results(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns domain -> `"before"` or `"after"` -> measure -> value; unknown measures are dropped."""
    results = {}
    for domain, values in metrics.items():
        stages = values if isinstance(values, Mapping) and {"before", "after"} & set(values) else {"after": values}
        results[domain] = {
            stage: _measures(domain, stages[stage]) for stage in ("before", "after") if stages.get(stage)
        }
        if not any(results[domain].values()):
            raise UserError(f"metrics of domain {domain!r} have none of {', '.join(MEASURES)}: give at least one")
    return results


def _measures(domain: str, values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise UserError(f"metrics of domain {domain!r} are no table: give {', '.join(MEASURES)}")
    found = {measure: values[measure] for measure in MEASURES if measure in values}
    for measure, value in found.items():
        if not isinstance(value, int | float):
            raise UserError(f"{measure} of domain {domain!r} is {value!r:.100}: it must be a number")
    return {measure: float(value) for measure, value in found.items()}


def _eval_results(results: Mapping, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", domain),
            dataset_name=domain,
            metric_type=measure,
            metric_name=MEASURES[measure],
            metric_value=value,
        )
        for domain, stages in results.items()
        for measure, value in stages.get("after", {}).items()
    ]


def _table(results: Mapping) -> list[list[str]]:
    """Returns header and rows of a table with one column for each measure and stage that occurs."""
    used = [
        (measure, stage)
        for measure in MEASURES
        for stage in ("before", "after")
        if any(measure in stages.get(stage, {}) for stages in results.values())
    ]
    if not used:
        return []
    compared = any(stage == "before" for _, stage in used)
    header = ["Domain", *(MEASURES[measure] + (f", {stage}" if compared else "") for measure, stage in used)]
    rows = []
    for domain, stages in results.items():
        values = [stages.get(stage, {}).get(measure) for measure, stage in used]
        rows.append([markdown_text(domain), *("-" if value is None else f"{value:,.3f}" for value in values)])
    return [header, *rows]


def _rows(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [
        (markdown_text(name).replace("_", " ").capitalize(), markdown_text(value))
        for name, value in (values or {}).items()
        if value is not None and value not in ("", [], {}, ())
    ]
