# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines routers whose tokens use different numbers of experts, each decided by the token alone.

A routing has one column per expert, empty where the token does not use the expert, or `max_experts_per_tok` columns.

# T tokens, E experts, K choices per token
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fields import COEFFICIENT, Condition, Range, setting
from .router import Router, Routing, RoutingContext, expert_load, masked_mean, softmax_scores


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class VariableKFields:
    """These fields configure routers whose number of experts varies from token to token."""

    router_top_p: float | int = setting(
        0.4,
        "The probability that the chosen experts of a token must reach together, for router_type='top_p'.",
        Range(0, 1, open_below=True),
        effect="detail",
        by_router=True,
    )
    max_experts_per_tok: int | None = setting(
        None,
        "The highest number of experts of a token where that number varies; None allows all experts.",
        Range(1, 2**16),
        effect="detail",
        by_router=True,
    )
    router_threshold: float | int = setting(
        0.0,
        "The threshold of router_type='continuous' on router logits: the value of a fixed threshold, or the initial value of "
        "a learned one.",
        Range(-1e6, 1e6),
        effect="detail",
        conditions=(
            Condition(lambda config: config.router_threshold_mode != "budget", "set router_threshold_mode='fixed'"),
        ),
        by_router=True,
    )
    router_threshold_mode: Literal["fixed", "learned", "budget"] = setting(
        "budget",
        'The threshold of router_type=\'continuous\': "fixed" and "learned" use one threshold, "budget" computes for each token '
        "the threshold at which its weights sum to num_experts_per_tok.",
        effect="detail",
        by_router=True,
    )
    router_cutoff: float | int = setting(
        0.01,
        "The weight at or below which router_type='continuous' skips an expert.",
        Range(0, 1),
        effect="detail",
        by_router=True,
    )
    router_sparsity_coef: float | int = setting(
        1e-8,
        "The initial coefficient of the L1 loss of router_type='remoe'.",
        COEFFICIENT,
        effect="training",
        by_router=True,
    )
    router_sparsity_step: float | int = setting(
        1.2,
        "The factor by which router_type='remoe' raises or lowers the coefficient of its L1 loss once per optimizer step.",
        Range(1, 1e6),
        effect="training",
        by_router=True,
    )


class VariableRouter(Router):
    """Base class of routers that use the experts which `active` marks; weights are scores, by default not renormalised."""

    reads = Router.reads | {"max_experts_per_tok"}
    variable_k = True
    norm_topk_prob_default = False

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.max_experts = config.max_experts_per_tok

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        active = self.active(scores)
        experts = torch.arange(self.num_outputs, device=scores.device).expand_as(scores)
        if self.max_experts is not None:
            experts = scores.topk(self.max_experts, dim=-1).indices
            active = active.gather(-1, experts)
        return experts.where(active, self.num_outputs)

    def active(self, scores: torch.Tensor) -> torch.Tensor:
        """Marks the experts (T, E) that a token uses, by scores (T, E)."""
        raise NotImplementedError


class TopPRouter(VariableRouter):
    """The fewest experts whose probabilities sum to `router_top_p` (Huang et al., arXiv:2403.07652).

    The paper also adds the entropy of the probabilities to the loss: `router_entropy_loss_coef`, 1e-4 there.
    """

    reads = (VariableRouter.reads | {"router_top_p"}) - {"scoring_func"}

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.top_p = config.router_top_p

    def score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return softmax_scores(logits)

    def active(self, scores: torch.Tensor) -> torch.Tensor:
        values, order = scores.sort(dim=-1, descending=True, stable=True)
        # an expert is needed as long as the experts before it sum to less; rounded, a few experts can sum to 1
        before = nn.functional.pad(values.cumsum(dim=-1)[:, :-1], (1, 0))
        needed = (before < self.top_p) | (self.top_p >= 1)
        return torch.zeros_like(needed).scatter(-1, order, needed)


class ContinuousRouter(VariableRouter):
    """Weighs each expert by a smooth gate, `weight = sigmoid((logit - tau) / router_temperature)`.

    Experts with a weight of `router_cutoff` or less are skipped. The threshold tau is, by `router_threshold_mode`, the
    constant `router_threshold` (`"fixed"`), a parameter that starts there (`"learned"`), or for each token the value at
    which the weights sum to `num_experts_per_tok` (`"budget"`), which becomes top-k as the temperature falls to 0. The
    gradient flows through the budget: `d tau / d logit_i = w'_i / sum(w')`, with w' the slope of the sigmoid.
    """

    reads = (
        VariableRouter.reads | {"router_temperature", "router_threshold", "router_threshold_mode", "router_cutoff"}
    ) - {"scoring_func"}

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.temperature, self.cutoff = config.router_temperature, config.router_cutoff
        self.mode, self.initial = config.router_threshold_mode, config.router_threshold
        self.tau = nn.Parameter(torch.empty(1)) if self.mode == "learned" else None

    @classmethod
    def validate(cls, config) -> None:
        if config.router_threshold_mode == "budget" and config.num_experts_per_tok >= config.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({config.num_experts_per_tok}) is no budget for {config.num_experts} experts: "
                "set it below num_experts."
            )

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.tau is not None:
            init.constant_(self.tau, self.initial)

    def score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mode == "budget":
            tau = self.budget(logits)
        else:
            tau = self.initial if self.tau is None else self.tau.to(logits.dtype)
        scores = ((logits - tau) / self.temperature).sigmoid()
        return scores, scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)

    def active(self, scores: torch.Tensor) -> torch.Tensor:
        return scores > self.cutoff

    def budget(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the threshold (T, 1) at which a token's weights sum to `num_experts_per_tok`, with gradient."""
        with torch.no_grad():
            # at `low` all weights are almost 1 and at `high` almost 0, so that the budget is between the two sums
            reach = self.temperature * 50
            low = logits.amin(dim=-1, keepdim=True) - reach
            high = logits.amax(dim=-1, keepdim=True) + reach
            for _ in range(60):
                tau = (low + high) / 2
                above = ((logits - tau) / self.temperature).sigmoid().sum(dim=-1, keepdim=True) > self.top_k
                low, high = tau.where(above, low), high.where(above, tau)
            weight = ((logits - tau) / self.temperature).sigmoid()
            slope = weight * (1 - weight)
            slope = slope / (slope.sum(dim=-1, keepdim=True) + 1e-20)
        # the value is tau, the gradient that of the implicit function
        return tau + (slope * (logits - logits.detach())).sum(dim=-1, keepdim=True)


class ReMoERouter(VariableRouter):
    """Weighs each expert by `relu(logit)`; a token uses the experts with a positive logit (ReMoE, arXiv:2412.14711).

    An auxiliary loss `lambda * mean_t sum_i f_i weight_ti`, with `f_i = E * c_i / (K T)`, makes the weights sparse and
    balanced. The buffer `sparsity_coef` is lambda. Once per optimizer step a controller multiplies or divides it by
    `router_sparsity_step`, so that a token uses `num_experts_per_tok` experts on average over the layers.
    """

    reads = (VariableRouter.reads | {"router_sparsity_coef", "router_sparsity_step"}) - {"scoring_func"}
    default_controller = "sparsity"

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.sparsity_step = config.router_sparsity_step
        self.initial_coef = config.router_sparsity_coef
        self.sparsity_coef = nn.Buffer(torch.full((1,), self.initial_coef, dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.constant_(self.sparsity_coef, self.initial_coef)

    def score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.relu()
        # a token that uses no expert has equal probabilities
        smoothed = scores + 1e-12
        return scores, smoothed / smoothed.sum(dim=-1, keepdim=True)

    def active(self, scores: torch.Tensor) -> torch.Tensor:
        return scores > 0

    def auxiliary_loss(self, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        return self.sparsity_coef[0] * remoe_loss(routing, self.top_k, token_mask)


def remoe_loss(routing: Routing, top_k: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Computes ReMoE's loss `mean_t sum_i f_i w_ti` with `f_i = E * c_i / (K T)` (arXiv:2412.14711).

    It is the L1 norm of the weights w, in which an expert with load c_i counts in proportion to the load.

    Args:
        routing: routing of T tokens.
        top_k: number K of experts that a token should use on average.
        token_mask: (T,), 0 at padding, which is excluded; None without padding.
    """
    load = expert_load(routing, token_mask)
    tokens = token_mask.sum().clamp(min=1) if token_mask is not None else max(len(routing.index), 1)
    factor = nn.functional.pad(load * (len(load) / (top_k * tokens)), (0, 1))  # 0 for an empty assignment
    return masked_mean((factor[routing.index] * routing.weight).sum(dim=-1), token_mask)
