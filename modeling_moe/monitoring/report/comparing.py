# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says what moved from one model's routing to another's on the same texts.

# D domains, L sparse layers, E experts of one layer, N tokens of all domains together
"""

import numpy as np

from ..warnings import listed
from .data import LayerChange, LayerTrace, ModelChanges
from .tracing import Traced


def load_shift(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the total variation distance (D,) of the experts' shares of two loads (D, E): 0 if equal, 1 if disjoint."""
    shares = [load / load.sum(axis=-1, keepdims=True).clip(min=1) for load in (first, second)]
    return np.abs(shares[0] - shares[1]).sum(axis=-1) / 2


def _same_tokens(first: Traced, second: Traced) -> bool:
    """Returns whether both tokenizers cut all texts into the same token ids."""
    return all(
        len(one) == len(other) and all(np.array_equal(*pair) for pair in zip(one, other, strict=True))
        for one, other in zip(first.blocks, second.blocks, strict=True)
    )


def _comparable(one: LayerTrace, other: LayerTrace) -> bool:
    return one.num_experts == other.num_experts


def compare_traces(first: Traced, second: Traced) -> ModelChanges:
    """Compares the routing of two models on the same domains, layer by layer in the order of the models.

    Args:
        first: trace of the first model, with `sets`.
        second: trace of the second model, with `sets`.
    """
    layers, others = first.trace.layers, second.trace.layers
    if len(layers) != len(others):
        note = f"The models have {len(layers)} and {len(others)} sparse layers, so no layer is compared with another."
        return ModelChanges([], note)
    same = _same_tokens(first, second)
    changes = []
    for place, (one, other) in enumerate(zip(layers, others, strict=True)):
        if not _comparable(one, other):
            continue
        changed = None
        if same and first.sets and second.sets:
            changed = float((first.sets[place] != second.sets[place]).mean())
        changes.append(LayerChange(one.layer, one.title, load_shift(one.load, other.load), changed))
    return ModelChanges(changes, _note(layers, others, same))


def _note(layers: list[LayerTrace], others: list[LayerTrace], same: bool) -> str:
    left_out = [one.title for one, other in zip(layers, others, strict=True) if not _comparable(one, other)]
    if len(left_out) == len(layers):
        return "The models differ in the number of experts of each layer, so no expert of one is compared with the other's."
    sentences = [
        "Expert i of one model is compared with expert i of the other, which says something only of related models."
    ]
    if left_out:
        sentences.append(f"Left out, since the numbers of experts differ: {listed(left_out, 'layer')}.")
    if same:
        sentences.append("Both tokenizers cut the texts into the same tokens, so that tokens are compared one by one.")
    else:
        sentences.append(
            "The tokenizers cut the texts differently, so that loads are compared and single tokens are not."
        )
    return " ".join(sentences)
