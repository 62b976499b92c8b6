# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module sums what a sparse layer does over many passes, on the layer's device and without waiting for it.

# T tokens, E experts, Z experts without weights (null and copy), K choices per token
"""

from dataclasses import dataclass, field

import torch

from ..router import fp32_linear
from .observing import LayerPass
from .probabilities import SCORINGS, ScoringEvidence, probabilities


# the probabilities that this package's routers return
EXACT = "routing"


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of sums: fp64 counts to 2^53, which 10^9 tokens need; Apple's GPUs have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class ProbabilitySums:
    """Sums over tokens of what follows from their probabilities.

    Attributes:
        probs: (E + Z,) probabilities.
        entropy: scalar, entropies in nats.
        margin: scalar, differences of the K-th and the (K + 1)-th largest probability.
        tokens: scalar, real tokens whose probabilities are known.
    """

    probs: torch.Tensor
    entropy: torch.Tensor
    margin: torch.Tensor
    tokens: torch.Tensor


@dataclass
class LayerSums:
    """The sums of one layer, all in fp64.

    Attributes:
        counts: (E + Z + 2,) assignments to each expert with and without weights, empty ones, and those of padding.
        dropped: scalar, assignments that capacity dropped.
        top_k: K of the last pass.
        by_scoring: sums for each way to probabilities that is still possible, by its name.
        evidence: what tells which way is right; None for this package's routers and without router logits.
        co_activation: (E, E) tokens that use both of two experts; None if it is not recorded.
        tokens: scalar, real tokens.
        notes: sentences about what the sums leave out.
    """

    counts: torch.Tensor
    dropped: torch.Tensor
    tokens: torch.Tensor
    top_k: int
    by_scoring: dict[str, ProbabilitySums] = field(default_factory=dict)
    evidence: ScoringEvidence | None = None
    co_activation: torch.Tensor | None = None
    notes: set[str] = field(default_factory=set)


def _outputs(event: LayerPass) -> int:
    """Returns the number E + Z of experts with and without weights."""
    return event.layer.num_experts if event.logits is None else event.logits.shape[-1]


def new_sums(event: LayerPass, co_activation: bool) -> LayerSums:
    """Returns sums of 0 for a layer, on the device of a pass."""
    # sums made under torch.inference_mode could not be added to outside of it
    with torch.inference_mode(False):
        return _new_sums(event, co_activation)


def _new_sums(event: LayerPass, co_activation: bool) -> LayerSums:
    device, experts, outputs = event.index.device, event.layer.num_experts, _outputs(event)
    zeros = torch.zeros(outputs + 2, dtype=_sum_dtype(device), device=device)
    sums = LayerSums(
        counts=zeros,
        dropped=zeros.new_zeros(()),
        tokens=zeros.new_zeros(()),
        top_k=event.index.shape[-1],
        co_activation=zeros.new_zeros(experts, experts) if co_activation else None,
    )
    if event.logits is not None:
        if event.probs is None:
            sums.evidence = ScoringEvidence(sums.top_k, zeros)
        for scoring in SCORINGS if event.probs is None else (EXACT,):
            scalars = [zeros.new_zeros(()) for _ in range(3)]
            sums.by_scoring[scoring] = ProbabilitySums(zeros.new_zeros(outputs), *scalars)
    return sums


@torch.no_grad()
def add_pass(sums: LayerSums, event: LayerPass) -> None:
    """Adds a pass; padding is left out."""
    real = event.token_mask
    outputs, index = len(sums.counts) - 2, event.index.long()
    bins = index.clamp(max=outputs)
    if real is not None:
        bins = bins.where(real[:, None], outputs + 1)
    one = sums.counts.new_ones(())
    sums.counts.scatter_add_(0, bins.flatten(), one.expand(bins.numel()))
    sums.tokens += len(index) if real is None else real.sum()
    if event.arrived is not event.index:
        dropped = (event.arrived != event.index) & (bins < outputs)
        sums.dropped += dropped.sum()
    if sums.co_activation is not None:
        experts = event.layer.num_experts
        used = torch.zeros(len(index), experts + 1, device=index.device).scatter_(-1, bins.clamp(max=experts), 1.0)
        sums.co_activation += fp32_linear(used[:, :-1].T, used[:, :-1].T)
    if event.logits is not None and sums.by_scoring:
        _add_probabilities(sums, event, event.logits)
    if event.note is not None:
        sums.notes.add(event.note)


def _add_probabilities(sums: LayerSums, event: LayerPass, logits: torch.Tensor) -> None:
    evidence = sums.evidence
    if evidence is not None and len(sums.by_scoring) > 1:
        evidence.add(logits, event.index, event.weight, event.token_mask)
        proven = evidence.settled()
        if proven is not None:
            sums.by_scoring = {proven: sums.by_scoring[proven]}
    for scoring, total in sums.by_scoring.items():
        probs = probabilities(logits, scoring) if event.probs is None else event.probs
        _add(total, probs.detach(), sums.top_k, event.token_mask)


def _add(total: ProbabilitySums, probs: torch.Tensor, top_k: int, real: torch.Tensor | None) -> None:
    """Adds the probabilities (T, E + Z) of tokens."""
    dtype = total.probs.dtype
    entropy = torch.special.entr(probs).sum(dim=-1)
    margin = None
    if top_k < probs.shape[-1]:
        best = probs.topk(top_k + 1, dim=-1).values
        margin = best[:, -2] - best[:, -1]
    if real is not None:
        # `where`, since a NaN at padding times 0 is a NaN
        probs, entropy = probs.where(real[:, None], 0.0), entropy.where(real, 0.0)
        margin = None if margin is None else margin.where(real, 0.0)
    total.tokens += len(probs) if real is None else real.sum()
    total.probs += probs.sum(dim=0, dtype=dtype)
    total.entropy += entropy.sum(dtype=dtype)
    if margin is not None:
        total.margin += margin.sum(dtype=dtype)
