# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says in words what a report shows: what was run, which layer is worst, and what is wrong.

The limits behind the words are constants here; each sentence names its figure, so that the reader can judge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...warnings import listed
from ..data import LayerTrace, ModelTrace
from .visible import shorten


PROBLEM, FINE, SEEN = KINDS = ("Problem", "Fine", "Seen")
# MaxVio above which a layer counts as imbalanced: the busiest expert has twice the mean load
IMBALANCED = 1.0
# share of the experts in effective use (exp of the load's entropy over E) below which a layer counts as collapsed
COLLAPSED = 0.25
# share of dropped assignments above which drops cost quality
DROPPED = 0.1
# token entropy over log E above which the router hardly chooses
UNDECIDED = 0.98
# assignments per expert below which the figures are mostly noise
FEW = 100


@dataclass(frozen=True)
class Finding:
    """One sentence of the summary, of a kind: what is a problem, what is fine, or what is only seen."""

    kind: str
    text: str


def isolated(name: str, limit: int = 60) -> str:
    """Returns a user's name for a sentence, with marks that keep its direction of writing from the words around it."""
    return f"\u2068{shorten(name, limit)}\u2069"


def experts_in_use(layer: LayerTrace) -> float:
    """Returns exp of the entropy of the load: E in balance, 1 if one expert gets all."""
    load = layer.load.sum(axis=0)
    share = load[load > 0] / max(load.sum(), 1)
    return math.exp(-float((share * np.log(share)).sum())) if len(share) else 0.0


def what_was_run(model: ModelTrace) -> str:
    """Returns the sentence with the model's name, its layers and experts, and the number of tokens."""
    experts = sorted({layer.num_experts for layer in model.layers})
    chosen = sorted({layer.top_k for layer in model.layers})
    texts = f"{len(model.domains)} domain{_s(len(model.domains))}"
    return (
        f"{isolated(model.name)} sent {sum(model.tokens.values()):,} tokens of {texts} through {len(model.layers)} sparse "
        f"layer{_s(len(model.layers))} of {_range(experts)} experts, {_range(chosen)} for each token."
    )


def worst_layer(model: ModelTrace) -> str:
    """Returns the sentence with the layer of the largest MaxVio."""
    worst = max(model.layers, key=lambda layer: layer.max_violation)
    busiest = int(worst.load.sum(axis=0).argmax())
    return (
        f"The least balanced layer is layer {worst.title}, where expert {busiest} gets "
        f"{worst.max_violation + 1:.3g} times the mean load (MaxVio {worst.max_violation:.3g})."
    )


def findings(model: ModelTrace) -> list[Finding]:
    """Returns what is wrong, problems first; what is right is said in one sentence for each question."""
    found = [
        _collapse(model.layers),
        _dead(model.layers),
        _imbalance(model.layers),
        _drops(model.layers),
        _undecided(model.layers),
        _domains(model),
        _noise(model.layers),
    ]
    return sorted((finding for finding in found if finding is not None), key=lambda finding: KINDS.index(finding.kind))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _named(layers: Sequence[LayerTrace]) -> str:
    return listed([layer.title for layer in layers], "layer")


def _collapse(layers: Sequence[LayerTrace]) -> Finding:
    fallen = [layer for layer in layers if experts_in_use(layer) < COLLAPSED * layer.num_experts]
    if not fallen:
        return Finding(
            FINE, "No layer has collapsed: the load of each is spread over at least a quarter of the experts."
        )
    worst = min(fallen, key=experts_in_use)
    return Finding(
        PROBLEM,
        f"Collapse in {_named(fallen)}: layer {worst.title} uses as few as {experts_in_use(worst):.2g} of "
        f"{worst.num_experts} experts; raise the balance loss or the step of the bias update.",
    )


def _dead(layers: Sequence[LayerTrace]) -> Finding:
    counts = [(layer, int((layer.load.sum(axis=0) == 0).sum())) for layer in layers]
    dead = [(layer, count) for layer, count in counts if count]
    if not dead:
        return Finding(FINE, "No expert is dead: each got at least one token.")
    total = sum(count for _, count in dead)
    return Finding(
        PROBLEM,
        f"{total} dead expert{_s(total)}, which got no token, in {_named([layer for layer, _ in dead])}; "
        "they cost memory and learn nothing.",
    )


def _imbalance(layers: Sequence[LayerTrace]) -> Finding:
    uneven = [layer for layer in layers if layer.max_violation > IMBALANCED]
    if not uneven:
        return Finding(FINE, "Balance is fair: no expert gets more than twice the mean load of the layer.")
    return Finding(
        PROBLEM, f"Imbalance in {_named(uneven)}: the busiest expert gets more than twice the mean load of the layer."
    )


def _drops(layers: Sequence[LayerTrace]) -> Finding | None:
    lossy = [layer for layer in layers if layer.dropped_share > DROPPED]
    if lossy:
        worst = max(lossy, key=lambda layer: layer.dropped_share)
        return Finding(
            PROBLEM,
            f"Capacity drops more than {_percent(DROPPED)} of the assignments in {_named(lossy)}, "
            f"{_percent(worst.dropped_share)} in layer {worst.title}; raise the capacity factor or the balance. All loads here are what is left after the drops.",
        )
    if any(layer.dropped_share for layer in layers):
        most = max(layer.dropped_share for layer in layers)
        return Finding(
            SEEN,
            f"Capacity drops at most {100 * most:.1f} % of a layer's assignments; all loads here are what is left.",
        )
    return None


def _undecided(layers: Sequence[LayerTrace]) -> Finding | None:
    known = [layer for layer in layers if layer.token_entropy is not None and layer.num_experts > 1]
    if not known:
        return None
    flat = [layer for layer in known if (layer.token_entropy or 0.0) > UNDECIDED * math.log(layer.num_experts)]
    if not flat:
        return None
    return Finding(
        PROBLEM,
        f"The router hardly chooses in {_named(flat)}: all experts are nearly equally probable for each token.",
    )


def _domains(model: ModelTrace) -> Finding | None:
    if len(model.domains) < 2:
        return None
    cells = sum(layer.significant.size for layer in model.layers)
    marked = sum(int(layer.significant.sum()) for layer in model.layers)
    if not marked:
        return Finding(SEEN, "No expert prefers or avoids a domain beyond chance on these texts.")
    return Finding(
        SEEN,
        f"In {marked:,} of {cells:,} cells of expert and domain ({_percent(marked / cells)}), the expert prefers or avoids the "
        "domain beyond chance.",
    )


def _noise(layers: Sequence[LayerTrace]) -> Finding | None:
    fewest = min(layer.load.sum() / layer.num_experts for layer in layers)
    if fewest >= FEW:
        return None
    return Finding(
        PROBLEM, f"Few tokens: an expert gets {fewest:.0f} on average, so that small differences are noise."
    )
