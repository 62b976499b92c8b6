# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module turns the scores of each domain into a table of a card and into results of the Hub's model-index."""

import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from ..utils.errors import UserError
from .wording import markdown_text


MEASURES = {"loss": "Loss", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}
# domain -> "before" or "after" -> measure -> value
Results = dict[str, dict[str, dict[str, float]]]


def read_results(metrics: Mapping[str, Mapping[str, Any]]) -> Results:
    """Returns domain -> `"before"` or `"after"` -> measure -> value; unknown measures are dropped.

    Args:
        metrics: measures of each domain, or measures of each stage of each domain.

    Raises:
        UserError: if a domain has none of the measures, or a value is no number.
    """
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


def model_index(results: Results, task: str) -> list[EvalResult]:
    """Returns the results of the last stage for the Hub's model-index, which has no place for infinity and NaN.

    Args:
        results: see [`read_results`].
        task: the Hub's name of the task.
    """
    found, types = [], set[str]()
    for domain, stages in results.items():
        kind = base = re.sub(r"[^\w.-]+", "-", domain) or "text"
        # the Hub groups results by the type, so two domains must not share one
        while kind in types:
            kind = f"{base}-{len(types)}"
        types.add(kind)
        found += [
            EvalResult(
                task_type=task,
                dataset_type=kind,
                dataset_name=domain or "text",
                metric_type=measure,
                metric_name=MEASURES[measure],
                metric_value=value,
            )
            for measure, value in stages.get("after", {}).items()
            if math.isfinite(value)
        ]
    return found


def results_table(results: Results) -> list[list[str]]:
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
