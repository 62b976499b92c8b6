# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module turns the router logits of any router into probabilities, by the scoring function that explains its weights.

The class of a router does not say whether it scores its logits by softmax, sigmoid or otherwise, or whether it returns
probabilities already. The combine weights of a token's chosen experts say it: whatever the router divides them by or scales
them with, their shares are those of the scores. Nothing here waits for an accelerator.

# T tokens, E experts, Z experts without weights, K experts per token
"""

from typing import NamedTuple

import torch
from torch import nn

from ..router import SCORING_FUNCS, renormalise


# the router returned scores: probabilities, or scores that are not normalised
GIVEN = "given"
SCORINGS = (*SCORING_FUNCS, GIVEN)
# largest mean difference between shares of weights and shares of scores, if the router computes in fp32 or in 16 bits
TOLERANCE, COARSE_TOLERANCE = 1e-3, 2e-2
# an explanation is certain if the next best one is this many times worse
MARGIN = 4.0
# tokens of which an explanation settles the scoring function for good; rounding errors of a few tokens may favour another one
ENOUGH = 128

_ELEMENTWISE = {
    "softmax": torch.exp,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    GIVEN: lambda logits: logits.clamp(min=0),
}


def probabilities(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """Returns probabilities (T, E + Z), in fp32 or fp64, of router logits (T, E + Z) by one of `SCORINGS`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return renormalise(logits.clamp(min=0)) if scoring == GIVEN else SCORING_FUNCS[scoring](logits)[1]


class ScoringEvidence:
    """Sums over tokens that tell which scoring function explains a router's weights.

    Args:
        top_k: number K of experts per token. With one expert per token there are no shares to compare: the weights of all
            tokens have to be proportional to the scores.
        like: tensor on the device of the sums, in their dtype.

    Attributes:
        sums: (5, 3) the evidence. A row for each of `SCORINGS` has the summed difference of shares and 0, 0; with one expert
            per token the sums of w s, w w and s s. The last row has the number of tokens, and the sums of their weights and
            of the difference between 1 and the sum of their logits.
        coarse: whether the router computed in 16 bits.
    """

    def __init__(self, top_k: int, like: torch.Tensor):
        self.top_k, self.coarse = top_k, False
        self.sums = like.new_zeros(len(SCORINGS) + 1, 3)
        self._settled: str | None = None
        self._copy: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def add(self, logits: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, real: torch.Tensor | None) -> None:
        """Adds tokens.

        Args:
            logits: (T, E + Z) router logits.
            index: (T, K) ids of the chosen experts; those of E + Z and more are empty.
            weight: (T, K) combine weights.
            real: (T,) bool, False at padding; None without padding.
        """
        dtype = torch.promote_types(torch.promote_types(logits.dtype, weight.dtype), torch.float32)
        self.coarse |= min(torch.finfo(logits.dtype).bits, torch.finfo(weight.dtype).bits) < 32
        chosen = index < logits.shape[-1]
        logits, weight = logits.detach().to(dtype), weight.detach().to(dtype).where(chosen, 0.0)
        picked = logits.gather(-1, index.long().clamp(max=logits.shape[-1] - 1))
        keep = (weight.sum(dim=-1) > 0) if real is None else real & (weight.sum(dim=-1) > 0)
        # without the largest logit, exp overflows; with one expert per token the whole softmax is the score
        shift = picked.amax(dim=-1, keepdim=True) if self.top_k > 1 else logits.logsumexp(dim=-1, keepdim=True)
        rows = [self._row(scoring, picked, shift, weight, chosen, keep) for scoring in SCORINGS]
        off = (logits.sum(dim=-1) - 1).abs() + logits.amin(dim=-1).clamp(max=0).abs()
        # `where`, since a NaN at padding times 0 is a NaN
        total = weight.sum(dim=-1).where(keep, 0.0)
        rows.append(torch.stack([self._sum(keep), self._sum(total), self._sum(off.where(keep, 0.0))]))
        self.sums += torch.stack(rows)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.sum(dtype=self.sums.dtype)

    def _row(
        self,
        scoring: str,
        picked: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        chosen: torch.Tensor,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the evidence (3,) of one scoring function."""
        score = _ELEMENTWISE[scoring](picked - shift if scoring == "softmax" else picked).where(chosen, 0.0)
        if self.top_k == 1:
            weight, score = (values[:, 0].where(keep, 0.0) for values in (weight, score))
            return torch.stack([self._sum(weight * score), self._sum(weight * weight), self._sum(score * score)])
        difference = (renormalise(weight) - renormalise(score)).abs().sum(dim=-1) / 2
        zero = self.sums.new_zeros(())
        return torch.stack([self._sum(difference.where(keep, 0.0)), zero, zero])

    def settled(self) -> str | None:
        """Returns the scoring function that enough tokens prove, or None; it never waits for an accelerator."""
        if self._settled is None and not torch.compiler.is_compiling():
            if self.sums.device.type == "cpu":
                self._settled = self._judge(self.sums)
            elif self.sums.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                self._settle_on_cuda()
        return self._settled

    def _settle_on_cuda(self) -> None:
        """Copies the evidence to the host beside the computation, and reads a copy that has arrived."""
        if self._copy is None:
            arrived = torch.cuda.Event()
            host = self.sums.to("cpu", non_blocking=True)
            arrived.record(torch.cuda.current_stream(self.sums.device))
            self._copy = host, arrived
        elif self._copy[1].query():
            self._settled, self._copy = self._judge(self._copy[0]), None

    def _judge(self, sums: torch.Tensor) -> str | None:
        return certain(sums, self.top_k, self.coarse) if sums[-1, 0] >= ENOUGH else None


def differences(sums: torch.Tensor, top_k: int) -> dict[str, float]:
    """Returns by how much each scoring function fails to explain the weights: 0 if the shares are equal, at most 1.

    Args:
        sums: (5, 3) as in [`ScoringEvidence`], on the CPU.
        top_k: K.
    """
    *rows, (tokens, _, off) = sums.tolist()
    if tokens == 0:
        return {}
    if top_k > 1:
        found = {name: row[0] / tokens for name, row in zip(SCORINGS, rows, strict=True)}
    else:
        # the sine of the angle between weights and scores, as vectors over the tokens
        cosines = [both / max(weight * score, 1e-300) ** 0.5 for both, weight, score in rows]
        found = {name: max(0.0, 1 - cosine**2) ** 0.5 for name, cosine in zip(SCORINGS, cosines, strict=True)}
    # numbers that are not negative and sum to 1 are probabilities, whatever the router does with them afterwards
    found[GIVEN] = 0.0 if off / tokens < COARSE_TOLERANCE else found[GIVEN]
    return found


def _is_constant(sums: torch.Tensor) -> bool:
    """Returns True if all tokens have one weight, of which nothing can be learned with one expert per token."""
    tokens, total, _ = sums[-1].tolist()
    return sums[0, 1].item() * tokens <= total**2 * (1 + 1e-6)


def certain(sums: torch.Tensor, top_k: int, coarse: bool) -> str | None:
    """Returns the scoring function that explains the weights much better than all others do, or None."""
    found = differences(sums, top_k)
    if not found or (top_k == 1 and found[GIVEN] > 0 and _is_constant(sums)):
        return None
    best, second = sorted(found, key=found.__getitem__)[:2]
    tolerance, noise = (COARSE_TOLERANCE, 2e-3) if coarse else (TOLERANCE, 1e-5)
    return best if found[best] <= tolerance and found[second] > MARGIN * found[best] + noise else None


class Explanation(NamedTuple):
    """How router logits become probabilities, or why it is unknown.

    Attributes:
        scoring: one of `SCORINGS`; None if unknown.
        reason: sentence that says why it is unknown; None if it is known.
    """

    scoring: str | None
    reason: str | None = None


def explanation(sums: torch.Tensor, top_k: int, coarse: bool, configured: str | None) -> Explanation:
    """Chooses the scoring function of a router.

    Args:
        sums: (5, 3) evidence as in [`ScoringEvidence`], on the CPU.
        top_k: K.
        coarse: whether the router computed in 16 bits.
        configured: `scoring_func` of the model's configuration, which decides where the weights tell nothing.
    """
    found = differences(sums, top_k)
    if not found:
        return Explanation(None, "no token has a combine weight")
    if top_k == 1 and found[GIVEN] > 0 and _is_constant(sums):
        if configured in SCORINGS:
            return Explanation(configured)
        return Explanation(
            None, "the one weight of each token is constant, and does not tell how router logits are scored"
        )
    best = min(found, key=found.__getitem__)
    if found[best] <= (COARSE_TOLERANCE if coarse else TOLERANCE):
        # close logits make all scores alike, and the configuration knows more than rounding errors
        unsure = configured in SCORINGS and found[configured] <= MARGIN * found[best] + (2e-3 if coarse else 1e-5)
        return Explanation(configured if unsure else best)
    return Explanation(
        None,
        f"neither softmax nor sigmoid nor sqrt(softplus) of the router logits explains the weights ({found[best]:.2g} off)",
    )
