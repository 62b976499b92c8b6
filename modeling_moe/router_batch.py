# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines routers that choose for many tokens at once, and a causal variant of expert choice.

In a causal language model a token's experts must not depend on later tokens. A router that chooses among all tokens of a
sequence tells a token which experts later tokens did not take (arXiv:2408.15664). Such routers have `causal = False`, and
the configuration refuses them unless `allow_noncausal` is set.

# T tokens, E experts, K choices per token
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .router import Router, Routing, RoutingContext
from .router_topk import SELECTION_READS, TopKRouter
from .router_variable_k import VariableRouter


class ExpertChoiceRouter(VariableRouter):
    """Lets each expert take the `ceil(n K / E)` best of a sequence's n tokens (Zhou et al., arXiv:2202.09368). Not causal.

    Each sequence is treated by itself, also in a packed row. Padding is never taken.
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
        # top_k may be a share, and 0.1 * 30 is 3.0000000000000004
        capacity = (count.double() * self.top_k / self.num_experts - 1e-9).ceil()
        # best first, the earlier token first among equals; then sorted by sequence, stably
        order = scores.argsort(dim=0, descending=True, stable=True)  # (T, E)
        order = order.gather(0, sequence[order].argsort(dim=0, stable=True))
        rank = order.argsort(dim=0) - sequence[:, None]
        chosen = (rank < capacity[:, None]) & (scores >= 0)
        experts = torch.arange(self.num_experts, device=scores.device).expand_as(chosen)
        return experts.where(chosen, self.num_experts)


class ExpertThresholdRouter(VariableRouter):
    """Lets each expert take the tokens that score above the expert's threshold (Expert Threshold, arXiv:2603.11535).

    The buffer `threshold` (E,) is a moving average, with `router_ema_decay`, of the score that `T K / E` tokens of an
    optimizer step exceed. It is expert choice over a stream instead of a batch, and therefore causal. A token can have no
    expert: use a shared expert (`num_shared_experts`).
    """

    default_controller = "threshold"

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.ema_decay = config.router_ema_decay
        self.threshold = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))
        # number of steps of the moving average; 0 before the first observation
        self.threshold_steps = nn.Buffer(torch.zeros(1, dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        # about the scores of a new router
        init.constant_(self.threshold, 1 / self.num_experts if self.scoring_func == "softmax" else 0.5)
        init.zeros_(self.threshold_steps)

    def active(self, scores: torch.Tensor) -> torch.Tensor:
        return scores > self.threshold


class SinkhornRouter(TopKRouter):
    """Chooses, in training, the K experts with the largest share of a token in a transport plan that fills all experts evenly.

    The plan is the Sinkhorn scaling of the scores (Clark et al., arXiv:2202.01169): rows sum to 1 / T, columns to 1 / E. It
    couples all tokens of the batch, so that training is not causal. In evaluation the K highest scores choose.
    """

    reads = (Router.reads | SELECTION_READS) - {"router_selection_bias_on"}
    causal = False
    iterations = 32

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        if self.training:
            scores = sinkhorn(scores, self.iterations, context.token_mask)
        return super().select(scores, context)


def sinkhorn(scores: torch.Tensor, iterations: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the transport plan (T, E): scores scaled until rows sum to 1 / T and columns to 1 / E.

    Args:
        scores: (T, E), positive.
        iterations: number of times that columns and rows are scaled; rows come last.
        token_mask: (T,), 0 at padding, whose rows are scaled but count in no column; None without padding.
    """
    mask = torch.ones_like(scores[:, :1]) if token_mask is None else token_mask[:, None].to(scores.dtype)
    tokens, experts = mask.sum().clamp(min=1), scores.shape[-1]
    # the scale of a row has no effect on the plan, and small scores would underflow
    plan = scores / scores.amax(dim=-1, keepdim=True).clamp(min=1e-30)
    for _ in range(iterations):
        plan = plan / ((plan * mask).sum(dim=0, keepdim=True) * experts + 1e-30)
        plan = plan / (plan.sum(dim=1, keepdim=True) * tokens + 1e-30)
    return plan


class BaseLayerRouter(TopKRouter):
    """Assigns tokens to experts, in training, with the highest total score at which no expert gets more than `ceil(T / E)`.

    In evaluation each token goes to its best expert (BASE layers, arXiv:2103.16716). It needs `num_experts_per_tok=1` and
    `norm_topk_prob=False`; the paper's weight is a sigmoid (`scoring_func="sigmoid"`). The assignment couples all tokens of
    the batch, so that training is not causal.
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

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
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
    """Returns an expert (T,) for each token, at most `ceil(T / E)` tokens per expert, with the highest sum of scores.

    It is Bertsekas's auction. A token without a place bids for the expert from which it gains most; the bid is the gain
    over the second best expert, and a step. An expert keeps its highest bidders, and its price is the lowest bid that it
    keeps. The auction is repeated from the prices found with smaller and smaller steps, because with a small step alone
    equal tokens would outbid each other for long.

    Args:
        scores: (T, E); entries that are not finite count as 0.
        tolerance: the sum is within `T * tolerance` of the highest possible sum, in units of the widest range of a token's
            scores.
    """
    tokens, experts = scores.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.long, device=scores.device)
    places = math.ceil(tokens / experts)
    scores = scores.double().nan_to_num(0.0, 0.0, 0.0)
    scores = scores - scores.amin(dim=-1, keepdim=True)
    scores = scores / scores.max().clamp(min=1e-30)
    # added tokens that gain nothing fill the last places, because prices above 0 are right only if no place stays free
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
    """Returns an expert (T,) for each token by scores (T, E), with `T = E * places`; raises the prices (E,) in place."""
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
