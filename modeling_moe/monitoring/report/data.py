# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These dataclasses hold all figures of a routing report; tracing fills them, and the page draws them.

# L sparse layers, D domains, E experts of one layer, K experts per token, S tokens of a text, P position bins

Texts in these dataclasses (tokens, domains, names of models) come from users and may hold anything, also markup and control
characters: whoever writes them into a page escapes them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TopToken:
    """One token that an expert takes often.

    Attributes:
        token: text of the token.
        count: number of the token's occurrences that the expert takes.
        share: `count` over the number of all occurrences of the token.
        context: one occurrence: the text before it, the token, the text after it.
    """

    token: str
    count: int
    share: float
    context: tuple[str, str, str]


@dataclass(frozen=True)
class LayerSummary:
    """Single figures of one layer, over one domain or over all.

    Attributes:
        max_violation: largest load over the mean load, minus 1 (MaxVio); 0 is balanced.
        dead_experts: share of the experts without a token.
        mean_experts: mean number of experts that a token reaches.
        dropped_share: share of the assignments that the capacity dropped.
        token_entropy: mean entropy of a token's router probabilities in nats; None where they are not known.
        marginal_entropy: entropy of the mean router probabilities in nats; None where they are not known.
        gate_margin: mean difference of a token's K-th and (K + 1)-th largest probability; None where it is not known, and
            where K is all experts.
    """

    max_violation: float
    dead_experts: float
    mean_experts: float
    dropped_share: float
    token_entropy: float | None
    marginal_entropy: float | None
    gate_margin: float | None


@dataclass(frozen=True)
class LayerTrace(LayerSummary):
    """The routing of one sparse layer on all texts; the inherited figures are those over all domains.

    Attributes:
        layer: index of the decoder layer.
        name: qualified name of the experts module.
        num_experts: E.
        top_k: K, the number of assignments that the experts get for each token, empty ones included.
        by_domain: D summaries, one for each domain.
        load: (D, E) int64, assignments that reached each expert.
        co_activation: (E, E) float64, share of the tokens that use both experts; the diagonal is the share of one.
        position: (P, E) int64, assignments that reached each expert by the token's position in the text.
        specialisation: (D, E) float64, log2 of an expert's share of a domain over the expert's mean share of all domains
            ([`~modeling_moe.monitoring.report.specialisation.specialisation`]); finite.
        significant: (D, E) bool, whether the expert's share of the domain differs from that of the other domains, after a
            correction for the number of cells of all layers.
        top_tokens: E lists, best first.
        attends: whether the experts stand inside attention.
    """

    layer: int
    name: str
    num_experts: int
    top_k: int
    by_domain: list[LayerSummary]
    load: np.ndarray
    co_activation: np.ndarray
    position: np.ndarray
    specialisation: np.ndarray
    significant: np.ndarray
    top_tokens: list[list[TopToken]]
    attends: bool = False

    @property
    def title(self) -> str:
        """The layer's index, and for experts inside attention the word for their place."""
        return f"{self.layer} (attention)" if self.attends else str(self.layer)


@dataclass(frozen=True)
class TracedText:
    """One text with the routing of each token.

    Attributes:
        domain: name of the text's domain.
        tokens: S texts to show. A character that several tokens spell belongs to the first of them, and the others are "…".
        index: (L, S, K) int32, chosen experts; -1 for an empty assignment, and where a layer has a smaller K.
        weight: (L, S, K) float32, combine weights; 0 for an empty assignment, NaN for one that capacity dropped.
        margin: (L, S) float32, difference of the K-th and (K + 1)-th largest probability, NaN for a layer whose
            probabilities are not known, or whose K is all experts; None if that holds for all layers.
    """

    domain: str
    tokens: list[str]
    index: np.ndarray
    weight: np.ndarray
    margin: np.ndarray | None


@dataclass(frozen=True)
class ModelTrace:
    """The routing of one model on texts of D domains.

    Attributes:
        name: name of the model to show.
        facts: facts about the model in reading order, as pairs of label and text.
        domains: D names.
        tokens: number of tokens of each domain.
        losses: cross entropy in nats per token of each domain; None for a model without a language model's head.
        layers: L traces, in the order in which the model calls its layers.
        paths: L - 1 arrays (E of layer l, E of layer l + 1) int64, the number of tokens by their first choice in both.
        position_edges: P + 1 positions; bin p holds positions from edge p up to, but without, edge p + 1.
        texts: some texts to look at, token by token.
    """

    name: str
    facts: dict[str, str]
    domains: list[str]
    tokens: dict[str, int]
    losses: dict[str, float] | None
    layers: list[LayerTrace]
    paths: list[np.ndarray]
    position_edges: list[int]
    texts: list[TracedText]


@dataclass(frozen=True)
class LayerChange:
    """What moved in one sparse layer from the first model to the second.

    Attributes:
        layer: index of the decoder layer in the first model.
        title: title of the layer in the first model ([`LayerTrace.title`]).
        load_shift: (D,) float64, total variation distance of the experts' shares of each domain, from 0 to 1.
        changed_tokens: share of the tokens whose set of experts changed; None where it cannot be told.
    """

    layer: int
    title: str
    load_shift: np.ndarray
    changed_tokens: float | None


@dataclass(frozen=True)
class ModelChanges:
    """What moved from the first model to the second on the same texts.

    Attributes:
        layers: one entry for each layer that can be compared, in the order of the models; empty if none can.
        note: sentences that say what is compared, and what cannot be and why.
    """

    layers: list[LayerChange]
    note: str


@dataclass(frozen=True)
class RoutingReport:
    """All that a routing report shows.

    Attributes:
        models: one model, or two to compare; none if only the history of a training run is drawn.
        changes: what moved between two models.
        history: entries of a trainer's log that hold `step` and keys such as `routing/layer_03/max_violation`.
    """

    models: list[ModelTrace] = field(default_factory=list)
    changes: ModelChanges | None = None
    history: list[dict[str, Any]] | None = None
