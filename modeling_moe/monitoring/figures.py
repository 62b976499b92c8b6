# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module turns the sums of sparse layers into the figures that people read.

# E experts, Z experts without weights, K choices per token
"""

from dataclasses import dataclass

import torch

from ..router_losses import balance
from .layer_sums import EXACT, LayerSums
from .probabilities import explanation
from .routing_metrics import dead_experts, load_variation, max_violation


# figures of a layer that are numbers, in the order in which they are shown
METRICS = (
    "max_violation",
    "load_variation",
    "dead_experts",
    "mean_experts",
    "empty_share",
    "dropped_share",
    "normalised_balance",
    "token_entropy",
    "marginal_entropy",
    "entropy_difference",
    "gate_margin",
)
# figures whose worst layer is shown beside their mean
WORST = ("max_violation", "dead_experts")


@dataclass(frozen=True)
class LayerFigures:
    """The routing of one sparse layer, over all tokens seen; padding is left out.

    Attributes:
        layer: index of the decoder layer.
        name: qualified name of the experts module.
        label: name of the layer in [`RoutingFigures.scalars`], such as `layer_03`.
        num_experts: number E of experts.
        top_k: number K of choices per token.
        tokens: number of tokens.
        load: (E,) fp64 on the CPU, tokens that chose each expert, before capacity.
        max_violation: largest load over the mean load, minus 1 (MaxVio, arXiv:2408.15664); 0 in balance.
        load_variation: deviation of the load over its mean (arXiv:1701.06538, eq. 7).
        dead_experts: share of the experts that no token chose.
        mean_experts: mean number of experts with weights that a token chose.
        empty_share: share of a token's K choices that chose no expert with weights.
        dropped_share: share of the assignments that capacity dropped.
        normalised_balance: load-balancing loss over K, 1 in balance; None without probabilities.
        token_entropy: mean entropy in nats of a token's probabilities, low if the router is sure; None without
            probabilities.
        marginal_entropy: entropy in nats of the mean probabilities, log(E + Z) in balance and low in collapse; None
            without probabilities.
        entropy_difference: marginal minus token entropy, the mutual information of token and expert; None without
            probabilities.
        gate_margin: mean difference of a token's K-th and (K + 1)-th largest probability; None without probabilities, and
            if K is all experts.
        co_activation: (E, E) fp64 on the CPU, share of the tokens that use both of two experts, and on the diagonal of one;
            None if it is not recorded.
        scoring: how router logits become probabilities: "softmax", "sigmoid", "sqrtsoftplus", "given" if the router returned
            scores, "routing" for this package's routers; None if unknown.
        notes: sentences about what is not known, and why.
    """

    layer: int
    name: str
    label: str
    num_experts: int
    top_k: int
    tokens: int
    load: torch.Tensor
    max_violation: float
    load_variation: float
    dead_experts: float
    mean_experts: float
    empty_share: float
    dropped_share: float
    normalised_balance: float | None = None
    token_entropy: float | None = None
    marginal_entropy: float | None = None
    entropy_difference: float | None = None
    gate_margin: float | None = None
    co_activation: torch.Tensor | None = None
    scoring: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoutingFigures:
    """The routing of a model.

    Attributes:
        layers: figures of each sparse layer, in the order of the model.
        overall: name of a figure -> its mean over the layers that saw tokens and know it; `max_violation_worst` and
            `dead_experts_worst` are those of the worst layer.
    """

    layers: list[LayerFigures]
    overall: dict[str, float]

    @property
    def notes(self) -> list[str]:
        """Returns the sentences of all layers, each once, with the first layer that they are about."""
        found: dict[str, str] = {}
        for layer in self.layers:
            for note in layer.notes:
                found.setdefault(note, layer.label)
        return [f"{label}: {note}" for note, label in found.items()]

    def scalars(self, prefix: str = "routing") -> dict[str, float]:
        """Returns all figures that are numbers, as a tracker takes them.

        Returns:
            `"routing/layer_03/max_violation"` and so on for each layer that saw tokens, and `"routing/max_violation"` and so
            on for the model.
        """
        values = {
            f"{prefix}/{layer.label}/{name}": value
            for layer in self.layers
            if layer.tokens
            for name in METRICS
            if (value := getattr(layer, name)) is not None
        }
        return values | {f"{prefix}/{name}": value for name, value in self.overall.items()}


@dataclass(frozen=True)
class LayerFacts:
    """What the figures need of a layer beside its sums.

    Attributes:
        layer, name, label, num_experts: as in [`LayerFigures`].
        has_router: whether the router's logits can be had.
        configured: `scoring_func` of the configuration; None if it has none.
    """

    layer: int
    name: str
    label: str
    num_experts: int
    has_router: bool
    configured: str | None


def unseen(facts: LayerFacts) -> LayerFigures:
    """Returns the figures of a layer that saw no token."""
    return LayerFigures(
        *(facts.layer, facts.name, facts.label, facts.num_experts, 0, 0),
        load=torch.zeros(facts.num_experts, dtype=torch.float64),
        max_violation=0.0,
        load_variation=0.0,
        dead_experts=0.0,
        mean_experts=0.0,
        empty_share=0.0,
        dropped_share=0.0,
        notes=("the layer saw no tokens",),
    )


def layer_figures(facts: LayerFacts, sums: LayerSums) -> LayerFigures:
    """Returns the figures of a layer from its sums, which lie on the CPU in fp64."""
    experts, outputs = facts.num_experts, len(sums.counts) - 2
    tokens, load = sums.tokens.item(), sums.counts[:experts]
    if not tokens:
        return unseen(facts)
    mean_experts = load.sum().item() / tokens
    known = _probability_figures(facts, sums, outputs)
    return LayerFigures(
        *(facts.layer, facts.name, facts.label, experts, sums.top_k, int(tokens)),
        load=load.clone(),
        max_violation=max_violation(load).item(),
        load_variation=load_variation(load).item(),
        dead_experts=dead_experts(load).item(),
        mean_experts=mean_experts,
        empty_share=1 - mean_experts / sums.top_k,
        dropped_share=(sums.dropped / sums.counts[:outputs].sum().clamp(min=1)).item(),
        co_activation=None if sums.co_activation is None else sums.co_activation / tokens,
        **known,
    )


def _probability_figures(facts: LayerFacts, sums: LayerSums, outputs: int) -> dict:
    """Returns the figures that need probabilities, and the notes of the layer."""
    notes = sorted(sums.notes)
    scoring, reason = EXACT, None
    if not sums.by_scoring:
        scoring, reason = None, "the model declares no router whose logits can be had before the experts are called"
        if facts.has_router:
            reason = "the router returned no router logits for the tokens of the experts"
    elif sums.evidence is not None:
        scoring, reason = explanation(sums.evidence.sums, sums.top_k, sums.evidence.coarse, facts.configured)
        if scoring is not None and scoring not in sums.by_scoring:
            scoring, reason = None, "the scoring of router logits changed while it was watched"
    if scoring is None:
        return {"notes": (*notes, f"entropies and gate margin are unknown: {reason}")}
    total = sums.by_scoring[scoring]
    mean = total.probs / total.tokens.clamp(min=1)
    load = sums.counts[:outputs]
    token, marginal = (total.entropy / total.tokens.clamp(min=1)).item(), torch.special.entr(mean).sum().item()
    return {
        "normalised_balance": balance(load, load.sum(), mean, facts.num_experts).item(),
        "token_entropy": token,
        "marginal_entropy": marginal,
        "entropy_difference": marginal - token,
        "gate_margin": (total.margin / total.tokens.clamp(min=1)).item() if sums.top_k < outputs else None,
        "scoring": scoring,
        "notes": tuple(notes),
    }


def overall_figures(layers: list[LayerFigures]) -> dict[str, float]:
    """Returns the means over layers, and the worst layer's figures."""
    overall = {}
    for name in METRICS:
        values = [value for layer in layers if layer.tokens and (value := getattr(layer, name)) is not None]
        if values:
            overall[name] = sum(values) / len(values)
            if name in WORST:
                overall[f"{name}_worst"] = max(values)
    return overall
