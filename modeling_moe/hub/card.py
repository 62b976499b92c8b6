# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the model card: metadata, facts, how the model was made, results, and how to load and serve it."""

import base64
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from ..utils.loading import has_tokenizer
from .facts import ModelFacts, has_chat_template, model_facts
from .history import RESIZING, check_card_fields, history
from .metadata import check_languages, check_license, is_hub_name
from .pictures import ASSETS, PICTURES, pictures_in
from .results import Results, model_index, read_results, results_table
from .wording import markdown_paragraph, markdown_text, without_paths


# a link to model_cards/card.md.jinja
TEMPLATE = Path(__file__).with_name("card.md.jinja")
# a card that this module wrote ends with this line: the hash of the text before it, and the card's fields as JSON in base64
MARK = re.compile(r"<!-- modeling_moe card ([0-9a-f]{64}) ([A-Za-z0-9+/=]+) -->\n?\Z")
# PEFT's empty card contains these texts
PEFT_CARD = ("# Model Card for Model ID", "[More Information Needed]")
# method of upcycling -> paper
PAPERS = {
    "copy": "Komatsuzaki et al., Sparse Upcycling, arXiv:2212.05055",
    "drop": "Nakamura et al., Drop-Upcycling, arXiv:2502.19261",
    "split": "Zhu et al., LLaMA-MoE, arXiv:2406.16554",
}
# names of options whose words make no title
TITLES = {"num_experts": "Experts", "num_experts_per_tok": "Experts per token", "lora_r": "LoRA rank"}


def write_model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    upcycling: Mapping[str, Any] | None = None,
    data: Mapping[str, Mapping[str, Any]] | None = None,
    training: Mapping[str, Any] | None = None,
    description: str | None = None,
    intended_use: str | None = None,
    tags: Sequence[str] | None = None,
) -> ModelCard:
    """Writes `README.md` into the folder of a saved model or LoRA adapter, without using the network.

    Arguments that are not given are taken from `conversion.json`, `finetuning.json` and `scores.json` in the folder. The
    card shows the pictures `assets/routing_load.png` and `assets/routing_specialisation.png` that lie in the folder.

    Args:
        folder: folder in which `save_pretrained` wrote the model; the facts come from config.json there.
        repo_id: name on the Hub, for title and code examples; the folder's name if not given.
        base_model: checkpoint(s) from which the model was made. Names on the Hub become metadata; the card shows only
            the last part of a local path.
        language: codes of languages such as `en`, for the metadata; left out if not known.
        license: the Hub's identifier, such as `apache-2.0` or `llama3.2`; left out if not known.
        metrics: results of each domain, `{"wiki": {"loss": ..., "perplexity": ..., "bits_per_byte": ...}}`, any of the
            three; or before and after training, `{"wiki": {"before": {...}, "after": {...}}}`.
        upcycling: names and values that describe how the dense model became sparse.
        data: what the model was trained on, `{"wiki": {"source": ..., "tokens": ..., "license": ...}}`, any of the three.
        training: names and values that describe how the model was trained afterwards.
        description: a sentence after the first one of the card.
        intended_use: what the model is for; a general text if not given.
        tags: metadata of the card; derived from the model if not given.

    Returns:
        The card that was written.

    Raises:
        UserError: if the folder holds no model, a record is damaged, the license is no identifier, a language is no code,
            or the metrics of a domain contain none of the three measures.
    """
    folder = Path(folder)
    given = {
        "repo_id": repo_id,
        "base_model": [base_model] if isinstance(base_model, str) else list(base_model or []),
        "language": language,
        "license": license,
        "metrics": metrics,
        "upcycling": upcycling,
        "data": data,
        "training": training,
        "description": description,
        "intended_use": intended_use,
        "tags": list(tags or []),
    }
    card = ModelCard(_card_text(folder, _non_empty(given), pictures_in(folder)))
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
    pictures: Iterable[str] = (),
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
        pictures: names of pictures of the routing that will be uploaded, beside those in the folder.
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
    fields = _non_empty(earlier | given | {"repo_id": repo_id})
    return _card_text(folder, fields, {*pictures_in(folder), *pictures}, trust_remote_code)


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
    return {name: without_paths(value) for name, value in given.items() if value not in (None, [], {}, "")}


def _card_text(
    folder: Path, fields: Mapping[str, Any], pictures: Iterable[str], trust_remote_code: bool = False
) -> str:
    """Renders the card; fields that are not given come from the records in the folder."""
    facts = model_facts(folder, trust_remote_code)
    recorded = history(folder)
    known = recorded | {name: value for name, value in fields.items() if name != "repo_id"}
    # one line without the mark that could end a block of code
    name = " ".join((fields.get("repo_id") or folder.resolve().name).split()).replace("`", "'") or "model"
    check_license(known.get("license"), recorded.get("license"))
    check_languages(known.get("language"))
    sources = known.get("base_model") or []
    results = read_results(known.get("metrics") or {})
    made = known.get("upcycling") or {}
    method = str(made.get("method"))
    card = ModelCard.from_template(
        _card_data(name, known, facts, results),
        template_path=str(TEMPLATE),
        name=name,
        shell_name=shlex.quote(name),
        title=markdown_text(name),
        description=markdown_paragraph(known.get("description") or ""),
        intended_use=markdown_paragraph(known.get("intended_use") or ""),
        license=markdown_text(known.get("license_name") or known.get("license") or ""),
        language=markdown_text(known.get("language") or ""),
        has_code=(folder / "modeling_moe.py").is_file(),
        chats=has_chat_template(folder),
        has_tokenizer=has_tokenizer(str(folder)),
        pictures=[(f"{ASSETS}/{picture}", PICTURES[picture]) for picture in sorted(pictures)],
        sources=[markdown_text(source) for source in sources],
        upcycling=_rows(made),
        made="Upcycling" if method in PAPERS else "Resizing" if method in RESIZING else "Conversion",
        pruned=method in ("prune", "merge"),
        paper=PAPERS.get(method),
        data=_data_table(known.get("data") or {}),
        training=_rows(known.get("training")),
        results=results_table(results),
        compared=any("before" in stages for stages in results.values()),
        **vars(facts),
    )
    text = card.content.rstrip("\n") + "\n\n"
    code = base64.b64encode(json.dumps(dict(fields)).encode()).decode()
    return f"{text}<!-- modeling_moe card {_hash(text)} {code} -->\n"


def _card_data(name: str, known: Mapping[str, Any], facts: ModelFacts, results: Results) -> ModelCardData:
    bases = [source for source in known.get("base_model") or [] if is_on_hub(source)]
    places = [str(domain.get("source", "")).partition(":")[0] for domain in _domains(known.get("data") or {}).values()]
    relation = None
    if bases:
        made = known.get("upcycling") or known.get("training")
        relation = "adapter" if facts.is_adapter else "merge" if len(bases) > 1 else "finetune" if made else None
    return ModelCardData(
        language=known.get("language"),
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=known.get("tags") or _tags(known, facts) or None,
        base_model=bases or None,
        base_model_relation=relation,
        datasets=[place for place in dict.fromkeys(places) if is_on_hub(place)] or None,
        model_name=(markdown_text(name).rpartition("/")[2] or "model") if results else None,
        eval_results=model_index(results, facts.task) or None,
    )


def is_on_hub(name: str) -> bool:
    """Returns whether a text is a Hub name `owner/name` rather than a path on this machine."""
    return is_hub_name(name) and not os.path.exists(name)


def _tags(known: Mapping[str, Any], facts: ModelFacts) -> list[str]:
    own = facts.base_model_type == MoEConfig.model_type if facts.is_adapter else facts.model_type is None
    made_here = own or bool(known.get("upcycling") or known.get("training"))
    kinds = {
        "moe": facts.is_sparse,
        "modeling_moe": made_here,
        "upcycling": (known.get("upcycling") or {}).get("method") in PAPERS,
        "lora": facts.is_adapter,
    }
    return [kind for kind, holds in kinds.items() if holds]


def _domains(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the description of each domain; a text alone is the domain's source.

    Raises:
        UserError: if a description is neither a text nor a table.
    """
    domains = {}
    for domain, described in data.items():
        if not isinstance(described, str | Mapping):
            raise UserError(f"data of domain {domain!r} is {described!r:.100}: give source, tokens or license")
        domains[domain] = {"source": described} if isinstance(described, str) else described
    return domains


def _data_table(data: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows of a table with a column for each of source, tokens and license that is known."""
    domains = _domains(data)
    columns = [
        name for name in ("source", "tokens", "license") if any(values.get(name) for values in domains.values())
    ]
    if not columns:
        return []
    rows = [[domain, *(values.get(name) or "-" for name in columns)] for domain, values in domains.items()]
    return [
        ["Domain", *(name.capitalize() for name in columns)],
        *([markdown_text(cell) for cell in row] for row in rows),
    ]


def _rows(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [
        (_title(name), markdown_text(value))
        for name, value in (values or {}).items()
        if value is not None and value not in ("", [], {}, ())
    ]


def _title(name: str) -> str:
    """Returns the title of a row for the name of an option: `lora_r` as `LoRA r`."""
    title = TITLES.get(name, markdown_text(name).replace("_", " ").replace("lora", "LoRA"))
    return title[:1].upper() + title[1:]
