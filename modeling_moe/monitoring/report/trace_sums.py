# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module sums up what one sparse layer does with the tokens of all texts, without keeping each token's routing.

# D domains, U units (stretches of text), E experts, Z experts without weights, K experts per token, P position bins,
# C candidates: tokens of the vocabulary that occur often, T tokens of a batch
"""

from typing import NamedTuple

import numpy as np
import torch

from ..routing_metrics import dead_experts, max_violation
from .data import LayerSummary


class TokenPlaces(NamedTuple):
    """Where the T tokens of a batch come from; all but the domain are arrays (T,) int64.

    Attributes:
        domain: number of the domain of the batch.
        unit: unit of each token.
        bin: position bin of each token.
        candidate: number of the candidate that the token is; -1 for a rare token.
        place: place of the token among all tokens of all domains.
    """

    domain: int
    unit: np.ndarray
    bin: np.ndarray
    candidate: np.ndarray
    place: np.ndarray


class TokenRouting(NamedTuple):
    """The routing of the T tokens of a batch in one layer, on the CPU.

    Attributes:
        index: (T, K) int64 chosen experts; -1 for an empty assignment.
        arrived: (T, K) int64 experts that the token reaches; -1 for an empty and for a dropped assignment.
        weight: (T, K) float64 combine weights; 0 where the token does not arrive.
        probs: (T', E + Z) float64 probabilities of the tokens that the layer processes; None where they are not known.
        margin: (T,) float64 difference of the probabilities of the last chosen and the first refused expert; None
            without probabilities, and if each of the T tokens chooses all experts.
    """

    index: np.ndarray
    arrived: np.ndarray
    weight: np.ndarray
    probs: torch.Tensor | None
    margin: np.ndarray | None

    def spread(self, places: np.ndarray, tokens: int) -> "TokenRouting":
        """Returns the routing of all tokens of a batch, of which these are some; the others have empty assignments.

        Args:
            places: (T,) int64 place of each token in the batch; -1 at padding.
            tokens: number of tokens of the batch.
        """
        real = places >= 0

        def placed(values: np.ndarray, empty: float) -> np.ndarray:
            whole = np.full((tokens, *values.shape[1:]), empty, values.dtype)
            whole[places[real]] = values[real]
            return whole

        return TokenRouting(
            index=placed(self.index, -1),
            arrived=placed(self.arrived, -1),
            weight=placed(self.weight, 0.0),
            probs=None if self.probs is None else self.probs[torch.from_numpy(real)],
            margin=None if self.margin is None else placed(self.margin, 0.0),
        )

    def first_choice(self) -> np.ndarray:
        """Returns the expert (T,) int64 with the largest weight; -1 for a token that reaches no expert."""
        best = np.where(self.arrived >= 0, self.weight, -np.inf).argmax(axis=-1)
        return np.take_along_axis(self.arrived, best[:, None], axis=-1)[:, 0]


def margins(probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns for each token the probability of the last chosen expert less that of the first refused one.

    Args:
        probs: (T, N) probabilities.
        chosen: (T,) int64 number of experts that each token chooses.

    Returns:
        (T,); 0 for a token that chooses no expert or all.
    """
    width = probs.shape[-1]
    ranked = probs.sort(dim=-1, descending=True).values
    last = chosen.clamp(1, max(width - 1, 1))[:, None]
    gap = ranked.gather(-1, last - 1) - ranked.gather(-1, last.clamp(max=width - 1))
    return gap[:, 0].where((chosen > 0) & (chosen < width), 0.0)


class TraceSums:
    """Sums over all tokens of one layer.

    Args:
        num_experts: E.
        unit_domain: (U,) domain of each unit.
        domains: D.
        bins: P.
        candidates: C.

    Attributes:
        top_k: largest number K of assignments that a token had.
        unit_load: (U, E) int64 assignments that reached each expert.
        position: (P, E) int64 assignments that reached each expert.
        together: (E, E) float64 number of tokens that reached both experts.
        taken: (C, E) int32 occurrences of each candidate that reached each expert.
        seen_at: (C, E) int32 place of the last of these occurrences.
    """

    def __init__(self, num_experts: int, unit_domain: np.ndarray, domains: int, bins: int, candidates: int):
        self.num_experts, self.unit_domain, self.domains = num_experts, unit_domain, domains
        self.top_k = 0
        self.unit_load = np.zeros((len(unit_domain), num_experts), np.int64)
        self.position = np.zeros((bins, num_experts), np.int64)
        self.together = np.zeros((num_experts, num_experts))
        self.taken = np.zeros((candidates, num_experts), np.int32)
        self.seen_at = np.zeros((candidates, num_experts), np.int32)
        # by domain: tokens, chosen experts, tokens with known probabilities, sum of token entropies, sum of margins
        self._sums = np.zeros((domains, 5))
        self._probs: np.ndarray | None = None
        self._has_margins = False

    def add(self, places: TokenPlaces, routing: TokenRouting) -> None:
        """Adds the tokens of a batch."""
        experts, arrived = self.num_experts, routing.arrived
        self.top_k = max(self.top_k, arrived.shape[-1])
        token, slot = np.nonzero(arrived >= 0)
        expert = arrived[token, slot]
        self.unit_load += count_pairs(places.unit[token], expert, self.unit_load.shape)
        self.position += count_pairs(places.bin[token], expert, self.position.shape)
        used = np.zeros((len(arrived), experts), np.float32)
        used[token, expert] = 1  # once, also where a router gives a token one expert twice
        self.together += used.T @ used
        token, expert = np.nonzero(used)
        frequent = places.candidate[token] >= 0
        token, expert = token[frequent], expert[frequent]
        candidate = places.candidate[token]
        self.taken += count_pairs(candidate, expert, self.taken.shape).astype(np.int32)
        self.seen_at[candidate, expert] = places.place[token]
        self._add_figures(places.domain, routing)

    def _add_figures(self, domain: int, routing: TokenRouting) -> None:
        self._sums[domain, :2] += len(routing.index), (routing.index >= 0).sum()
        if routing.probs is None:
            return
        entropy = torch.special.entr(routing.probs).sum().item()
        self._sums[domain, 2:4] += len(routing.probs), entropy
        if routing.margin is not None:
            self._has_margins = True
            self._sums[domain, 4] += routing.margin.sum()
        if self._probs is None:
            self._probs = np.zeros((self.domains, routing.probs.shape[-1]))
        self._probs[domain] += routing.probs.sum(dim=0).numpy()

    @property
    def load(self) -> np.ndarray:
        """Returns the assignments (D, E) int64 that reached each expert."""
        load = np.zeros((self.domains, self.num_experts), np.int64)
        np.add.at(load, self.unit_domain, self.unit_load)
        return load

    @property
    def co_activation(self) -> np.ndarray:
        """Returns the share (E, E) float64 of the tokens that reached both experts."""
        return self.together / max(self._sums[:, 0].sum(), 1)

    def summary(self, domain: int | None = None) -> LayerSummary:
        """Returns the figures of one domain, or of all domains together."""
        chosen = slice(None) if domain is None else slice(domain, domain + 1)
        tokens, assigned, known, entropy, margin = self._sums[chosen].sum(axis=0).tolist()
        load = torch.from_numpy(self.load[chosen].sum(axis=0)).double()
        marginal = None
        if self._probs is not None and known:
            marginal = torch.special.entr(torch.from_numpy(self._probs[chosen].sum(axis=0) / known)).sum().item()
        return LayerSummary(
            max_violation=max_violation(load).item(),
            dead_experts=dead_experts(load).item(),
            mean_experts=load.sum().item() / max(tokens, 1),
            dropped_share=1 - load.sum().item() / assigned if assigned else 0.0,
            token_entropy=entropy / known if known else None,
            marginal_entropy=marginal,
            gate_margin=margin / known if known and self._has_margins else None,
        )


def count_pairs(row: np.ndarray, expert: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns how often each pair of a row and an expert occurs, as an array of the shape (rows, E)."""
    rows, experts = shape
    return np.bincount(row * experts + expert, minlength=rows * experts).reshape(shape)
