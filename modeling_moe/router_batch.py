# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Routers that look at many tokens at once, and what makes one of them fit for a causal language model.

In a causal model a token's experts must not depend on later tokens: choosing among all tokens of a sequence tells each
one which experts the later ones did not take (arXiv:2408.15664). Such routers say so by `causal = False` and
the configuration refuses them unless `allow_noncausal` is set.

# T tokens, E experts, K slots per token
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .router import Router, Routing, RoutingContext
from .router_topk import SELECTION_READS, TopKRouter
from .router_variable_k import VariableRouter


class ExpertChoiceRouter(VariableRouter):
    """Each expert takes its `ceil(n K / E)` best of a sequence's n tokens (Zhou et al., arXiv:2202.09368).

    Within each sequence, packed with others or not, so that sequences do not depend on each other; padding is never taken.
    Not causal.
    """

    # the load of each sequence is balanced by construction
    reads = Router.reads - {"router_aux_loss_scope"}
    causal = False
    per_token = False

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        sequence = context.sequences(len(scores), scores.device)
        real = torch.ones_like(sequence)
        if context.token_mask is not None:
            real = (context.token_mask > 0).long()
            scores = scores.masked_fill(real[:, None] == 0, -1.0)
        count = torch.zeros_like(real).scatter_add(0, sequence, real)[sequence]
        capacity = (count * self.top_k + self.num_experts - 1) // self.num_experts
        # best first, of equal scores the earlier token; then sequence by sequence, of which each keeps its place
        order = scores.argsort(dim=0, descending=True, stable=True)  # (T, E)
        order = order.gather(0, sequence[order].argsort(dim=0, stable=True))
        rank = order.argsort(dim=0) - sequence[:, None]
        chosen = (rank < capacity[:, None]) & (scores >= 0)
        slots = torch.arange(self.num_experts, device=scores.device).expand_as(chosen)
        return slots.where(chosen, self.num_experts)


class ExpertThresholdRouter(VariableRouter):
    """An expert takes the tokens that score above its threshold (Expert Threshold, arXiv:2603.11535).

    The buffer `threshold` (E,) follows, as a moving average with `router_ema_decay`, the score that `T K / E` tokens of an
    optimizer step exceed: expert choice over a stream instead of a batch, and so causal. A token can be left with no
    expert: keep a shared one (`num_shared_experts`).
    """

    default_controller = "threshold"

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.ema_decay = config.router_ema_decay
        self.threshold = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))
        # of the moving average; 0 says that nothing has been measured
        self.threshold_steps = nn.Buffer(torch.zeros(1, dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        # what a new router's scores lie around
        init.constant_(self.threshold, 1 / self.num_experts if self.scoring_func == "softmax" else 0.5)
        init.zeros_(self.threshold_steps)

    def active(self, scores: torch.Tensor) -> torch.Tensor:
        return scores > self.threshold


class SinkhornRouter(TopKRouter):
    """In training, the K experts with the most of a token in a transport plan that fills all experts evenly; in
    evaluation the K highest scores.

    The plan is the Sinkhorn scaling of the scores (Clark et al., arXiv:2202.01169): rows sum to 1 / T, columns
    to 1 / E. It couples all tokens of the batch, so training is not causal.
    """

    reads = Router.reads | SELECTION_READS
    causal = False
    iterations = 32

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        if self.training:
            scores = sinkhorn(scores, self.iterations, context.token_mask)
        return super().select(scores, context)


def sinkhorn(scores: torch.Tensor, iterations: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Transport plan (T, E): positive scores (T, E) scaled by rows to sums of 1 / T and by columns to 1 / E.

    Args:
        scores: (T, E), positive.
        iterations: times that both are scaled; rows come last.
        token_mask: (T,), 0 for tokens that take no part (padding): their rows are scaled, and count in no column.
    """
    mask = torch.ones_like(scores[:, :1]) if token_mask is None else token_mask[:, None].to(scores.dtype)
    tokens, experts = mask.sum().clamp(min=1), scores.shape[-1]
    # scale of the rows aside: it drops out, and small scores would underflow
    plan = scores / scores.amax(dim=-1, keepdim=True).clamp(min=1e-30)
    for _ in range(iterations):
        plan = plan / ((plan * mask).sum(dim=0, keepdim=True) * experts + 1e-30)
        plan = plan / (plan.sum(dim=1, keepdim=True) * tokens + 1e-30)
    return plan


class BaseLayerRouter(TopKRouter):
    """In training, the assignment of tokens to experts with the highest total score in which every expert gets
    `ceil(T / E)` tokens at most; in evaluation each token's best expert (BASE layers, arXiv:2103.16716).

    `num_experts_per_tok=1`, `norm_topk_prob=False`; the paper's weight is the sigmoid: `scoring_func="sigmoid"`. The
    assignment couples all tokens of the batch, so training is not causal.
    """

    reads = Router.reads
    causal = False
    norm_topk_prob_default = False

    @classmethod
    def validate(cls, config) -> None:
        if config.num_experts_per_tok != 1:
            raise ValueError(
                f"num_experts_per_tok is {config.num_experts_per_tok}: router_type='base_layer' assigns each token to 1 expert."
            )
        if config.router_selection_bias or config.n_group > 1:
            raise ValueError(
                "router_type='base_layer' balances by itself: set router_selection_bias=False and n_group=1."
            )

    def route(self, logits: torch.Tensor, context: RoutingContext):
        if not self.training:
            return super().route(logits, context)
        scores, probs = self.score(logits)
        with torch.no_grad():
            real = torch.ones_like(logits[:, 0], dtype=torch.bool)
            if context.token_mask is not None:
                real = context.token_mask > 0
            index = logits.argmax(dim=-1)
            index[real] = balanced_assignment(logits[real])
        return Routing(logits, self.weigh(scores, index[:, None]), index[:, None], probs)


def balanced_assignment(scores: torch.Tensor, tolerance: float = 1e-3) -> torch.Tensor:
    """Expert (T,) of each token so that none has more than `ceil(T / E)` and the scores' sum is highest.

    Bertsekas's auction: tokens without a place bid for the expert that they gain most from, by what they gain over the
    next best, and a step; an expert keeps its highest bidders and its price is the lowest bid it keeps. It is repeated
    from the prices found, with ever smaller steps, lest equal tokens outbid each other by small ones for long. The sum is
    within `T * tolerance` of the best possible, in units of the widest range of a token's scores.

    Args:
        scores: (T, E); what is not finite counts as 0.
        tolerance: in units of that range.
    """
    tokens, experts = scores.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.long, device=scores.device)
    places = math.ceil(tokens / experts)
    scores = scores.double().nan_to_num(0.0, 0.0, 0.0)
    scores = scores - scores.amin(dim=-1, keepdim=True)
    scores = scores / scores.max().clamp(min=1e-30)
    # tokens that gain nothing anywhere fill the last places: prices that begin above 0 are right only if none stays free
    scores = nn.functional.pad(scores, (0, 0, 0, places * experts - tokens))
    price = scores.new_zeros(experts)
    last = tolerance * tokens / len(scores)
    step = max(0.25, last)
    index = auction(scores, price, places, step)
    while step > last:
        step = max(step / 4, last)
        index = auction(scores, price, places, step)
    return index[:tokens]


def auction(scores: torch.Tensor, price: torch.Tensor, places: int, step: float) -> torch.Tensor:
    """Expert (T,) of each token, from scores (T, E) with `T = E * places`; raises the prices (E,) in place."""
    experts = len(price)
    index = torch.full((len(scores),), experts, device=scores.device)
    bids = scores.new_full((len(scores),), float("-inf"))
    while (waiting := (index == experts).nonzero().flatten()).numel():
        gain, best = (scores[waiting] - price).topk(2, dim=-1)
        index[waiting] = best[:, 0]
        bids[waiting] = price[best[:, 0]] + gain[:, 0] - gain[:, 1] + step
        for expert in best[:, 0].unique().tolist():
            holders = (index == expert).nonzero().flatten()
            if len(holders) > places:
                order = bids[holders].argsort(descending=True, stable=True)
                index[holders[order[places:]]] = experts
                holders = holders[order[:places]]
            if len(holders) == places:
                price[expert] = bids[holders].min()
    return index
