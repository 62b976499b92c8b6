# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How a token chooses its experts.

A router is `score -> select -> weigh` and returns a [`Routing`]; a new router overrides one of the three and adds its
name to `ROUTERS`, a new score adds its name to `SCORING_FUNCS`. Router arithmetic is fp32 whatever the model's dtype (fp64 for an fp64 model).

# T tokens, H hidden, E experts, K experts per token
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast


class Routing(NamedTuple):
    """What a router decides for T tokens.

    Attributes:
        logits: (T, E) fp32, the router's raw scores; transformers records them as `router_logits`.
        weight: (T, K) fp32, factor on each chosen expert's output; carries the gradient, 0 in an empty slot.
        index: (T, K) int64, the chosen experts; `E` marks an empty slot.
        probs: (T, E) fp32, scores normalised to sum 1 over the experts.
    """

    logits: torch.Tensor
    weight: torch.Tensor
    index: torch.Tensor
    probs: torch.Tensor


def expert_load(routing: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Number of tokens sent to each expert, without gradient.

    Args:
        routing: of T tokens.
        token_mask: (T,), 0 for tokens that do not count (padding).

    Returns:
        (E,) in the dtype of the logits. Empty slots count for no expert.
    """
    num_experts = routing.probs.shape[-1]
    ones = torch.ones_like(routing.weight) if token_mask is None else token_mask[:, None].expand_as(routing.weight)
    counts = routing.probs.new_zeros(num_experts + 1)
    counts = counts.scatter_add(0, routing.index.flatten(), ones.to(counts.dtype).flatten())
    return counts[:num_experts].detach()


def softmax_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (T, E), which both choose and weigh."""
    probs = logits.softmax(dim=-1)
    return probs, probs


def sigmoid_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sigmoid of each logit (T, E), and the same normalised to sum 1 (arXiv:2412.19437, eq. 15)."""
    scores = logits.sigmoid()
    return scores, scores / scores.sum(dim=-1, keepdim=True)


# scoring_func -> logits (T, E) to scores (T, E) and probs (T, E)
SCORING_FUNCS = {"softmax": softmax_scores, "sigmoid": sigmoid_scores}


class TopKRouter(nn.Module):
    """Sends each token to the K experts with the highest scores.

    With `scoring_func="softmax"` this is the router of Mixtral (`norm_topk_prob`), OLMoE and Qwen-MoE; with
    `"sigmoid"`, `router_selection_bias` and groups that of DeepSeek-V3 (arXiv:2412.19437, eq. 12-16).
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.jitter_noise = config.router_jitter_noise
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        if config.router_selection_bias:
            self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None

    def forward(self, hidden_states: torch.Tensor) -> Routing:
        """Routes tokens (T, H)."""
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            hidden_states = hidden_states * noise
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        # under autocast a linear in fp32 would run in bf16
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype))  # (T, E)
        scores, probs = self.score(logits)
        with torch.no_grad():
            index = self.select(scores)  # (T, K)
        return Routing(logits, self.weigh(scores, index), index, probs)

    def score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (T, E) that choose and weigh the experts, and the same normalised to sum 1."""
        return SCORING_FUNCS[self.scoring_func](logits)

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """Experts (T, K) chosen by scores (T, E)."""
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if self.n_group > 1:
            scores = self.mask_groups(scores)
        return scores.topk(self.top_k, dim=-1).indices

    def mask_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (T, E) with -inf outside the `topk_group` groups whose two best experts sum highest."""
        grouped = scores.unflatten(-1, (self.n_group, -1))  # (T, groups, E / groups)
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        best = strength.topk(self.topk_group, dim=-1).indices
        eligible = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~eligible[..., None], float("-inf")).flatten(-2)

    def weigh(self, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Weights (T, K) of the chosen experts."""
        weight = scores.gather(-1, index)
        if self.norm_topk_prob:
            # sigmoid scores can all underflow to 0
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        return weight * self.scaling


# router_type -> class
ROUTERS = {"topk": TopKRouter}
