# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines routers that send each token to the K experts with the highest scores: plain, with noise, or in groups.

# T tokens, H hidden, E experts, Z experts without weights (null and copy), K choices per token, G groups
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fields import POSITIVE, Condition, Range, setting
from .router import CAPACITY_READS, Router, Routing, RoutingContext, fp32_linear, renormalise


# fields by which [`TopKRouter`] selects
SELECTION_READS = frozenset(
    {"n_group", "topk_group", "group_score", "router_selection_bias", "router_selection_bias_on"}
)


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class TopKFields:
    """These fields configure routers that choose the experts with the highest scores."""

    n_group: int = setting(
        1,
        "The number of groups of experts; a token can use experts of topk_group groups (DeepSeek-V3). 1 switches groups off. "
        "For router_type='hierarchical' it is the number of outputs of the first level.",
        Range(1, 2**16),
        by_router=True,
    )
    topk_group: int = setting(
        1,
        "The number of groups of experts that a token can use.",
        Range(1, 2**16),
        effect="detail",
        by_router=True,
    )
    group_score: Literal["top2sum", "max"] = setting(
        "top2sum",
        'The score by which groups of experts are chosen: "top2sum" adds the two highest scores of a group (DeepSeek-V3), '
        '"max" takes the highest (DeepSeek-V2).',
        effect="detail",
        conditions=(Condition(lambda config: config.n_group > 1, "set n_group above 1"),),
        by_router=True,
    )
    router_selection_bias: bool = setting(
        False,
        "Adds the fp32 buffer e_score_correction_bias to the scores that choose the experts, and not to the weights of the "
        "chosen experts (DeepSeek-V3, arXiv:2408.15664).",
        by_router=True,
    )
    router_selection_bias_on: Literal["scores", "logits"] = setting(
        "scores",
        'What e_score_correction_bias is added to before the highest values, and groups, are chosen: "scores" (DeepSeek-V3) or '
        '"logits" (Kolibri).',
        conditions=(Condition(lambda config: config.router_selection_bias, "set router_selection_bias=True"),),
        by_router=True,
    )
    router_temperature: float | int = setting(
        1.0,
        "The temperature of the random choice of router_type='gumbel_topk', or of the gate of router_type='continuous'.",
        POSITIVE,
        effect="detail",
        by_router=True,
    )


class TopKRouter(Router):
    """Chooses the K experts with the highest scores.

    The fields make it the router of many models:
    - Mixtral: `scoring_func="softmax"`, `norm_topk_prob=True`; OLMoE and Qwen-MoE with `norm_topk_prob=False`;
    - Switch (arXiv:2101.03961, eq. 1-2): K = 1 and `norm_topk_prob=False`;
    - DeepSeek-V3 (arXiv:2412.19437, eq. 12-16): `scoring_func="sigmoid"`, `router_selection_bias=True` and groups;
      DeepSeek-V2 has `group_score="max"`, DeepSeek-V4 `scoring_func="sqrtsoftplus"`, Kolibri
      `router_selection_bias_on="logits"`;
    - AdaMoE (arXiv:2406.13233): `num_null_experts` experts do nothing, so that tokens use different numbers of experts;
    - LongCat-Flash (arXiv:2509.01322): `num_copy_experts` experts return the token; MoE++ (arXiv:2410.07348), without
      constant experts, has null and copy experts.
    """

    reads = Router.reads | SELECTION_READS | {"num_null_experts", "num_copy_experts"}

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.n_group, self.topk_group, self.group_score = config.n_group, config.topk_group, config.group_score
        self.bias_update_rate, self.ema_decay = config.router_bias_update_rate, config.router_ema_decay
        self.expected_experts = config.expected_experts_per_tok
        self.ranks_logits = config.router_selection_bias_on == "logits"
        if config.router_selection_bias:
            self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_outputs, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)

    def ranking(self, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.ranks_logits else scores

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if self.n_group > 1:
            scores = self.mask_groups(scores)
        return scores.topk(self.top_k, dim=-1).indices

    def mask_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """Replaces scores (T, E) by -inf outside the `topk_group` groups of experts with the highest group score.

        The score of a group is the sum of its two highest scores (`group_score="top2sum"`) or its highest score (`"max"`).
        """
        grouped = scores.unflatten(-1, (self.n_group, -1))  # (T, G, E / G)
        best = 1 if self.group_score == "max" else min(2, grouped.shape[-1])
        strength = grouped.topk(best, dim=-1).values.sum(dim=-1)
        kept = strength.topk(self.topk_group, dim=-1).indices
        eligible = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, kept, True)
        return grouped.masked_fill(~eligible[..., None], float("-inf")).flatten(-2)


class NoisyTopKRouter(TopKRouter):
    """Adds learned Gaussian noise to the logits in training (Shazeer et al., arXiv:1701.06538, eq. 3-5 and appendix A).

    `h = x W_g + N(0, 1) * (softplus(x W_noise) + 0.01)`; both matrices start at 0. `Routing.selection_probability` is the
    paper's P(x, i), whose load loss has the coefficient `router_load_loss_coef`.
    """

    reads = Router.reads | {"router_load_loss_coef"}

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    @classmethod
    def validate(cls, config) -> None:
        if config.num_experts_per_tok >= config.num_router_outputs:
            raise ValueError(
                f"num_experts_per_tok ({config.num_experts_per_tok}) leaves the noise of noisy_topk no expert to choose "
                f"from: choose fewer than all {config.num_router_outputs}."
            )
        if config.router_selection_bias or config.n_group > 1:
            raise ValueError(
                "router_type='noisy_topk' computes the probability of an expert from its logits alone: set "
                "router_selection_bias=False and n_group=1."
            )

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.zeros_(self.weight)
        init.zeros_(self.noise_weight)

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        clean = self.logits(hidden_states, context)
        if not self.training:
            return self.route(clean, context)
        std = nn.functional.softplus(fp32_linear(hidden_states, self.noise_weight)) + 0.01
        noisy = clean + std * torch.randn_like(std)
        return self.route(noisy, context)._replace(selection_probability=self.selection_probability(clean, noisy, std))

    def selection_probability(self, clean: torch.Tensor, noisy: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """Returns the probability (T, E) that an expert is among the K best if only the expert's noise is drawn again."""
        best = noisy.topk(self.top_k + 1, dim=-1).values
        kth, next_best = best[:, -2:-1], best[:, -1:]
        # the K-th best logit of the other experts, which for a chosen expert is the best logit that was not chosen
        threshold = torch.where(noisy >= kth, next_best, kth)
        return torch.special.ndtr((clean - threshold) / std)


class GumbelTopKRouter(TopKRouter):
    """Draws K experts without replacement in training, with the probabilities of the scores (Plackett-Luce).

    It chooses the K largest of `log score / temperature + Gumbel noise` (Kool et al., arXiv:1903.06059). The weights are
    those of scores without noise.
    """

    reads = (Router.reads | SELECTION_READS | {"router_temperature"}) - {"router_selection_bias_on"}

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.temperature = config.router_temperature

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        if self.training:
            gumbel = -torch.empty_like(scores).exponential_().log()
            scores = scores.log() / self.temperature + gumbel
        return super().select(scores, context)


class GShardRouter(TopKRouter):
    """Chooses two experts, and drops the second one in training with probability `max(0, 1 - 2 g_2)`, g_2 its weight.

    GShard (arXiv:2006.16668, algorithm 1) and GLaM (arXiv:2112.06905).
    """

    # the second weight is a probability here, which a factor of the expert would change
    reads = (Router.reads | SELECTION_READS) - {"router_expert_scale"}
    variable_k = True

    @classmethod
    def validate(cls, config) -> None:
        if config.num_experts_per_tok != 2:
            raise ValueError(
                f"num_experts_per_tok is {config.num_experts_per_tok}: router_type='gshard' chooses 2 experts."
            )

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        routing = super().route(logits, context)
        if not self.training:
            return routing
        kept = torch.rand_like(routing.weight) < 2 * renormalise(routing.weight)
        kept[:, 0] = True
        return routing._replace(
            index=routing.index.where(kept, self.num_outputs), weight=routing.weight.where(kept, 0.0)
        )


class SparseMixerRouter(TopKRouter):
    """Draws K experts one after another, with a gradient of the draw: `router_gradient="sparsemixer"`.

    SparseMixer-v2 (GRIN, arXiv:2409.12136) draws from the softmax over the logits within `2 * router_jitter_noise`
    (relative) of the largest logit. The weight is the probability of the expert; in three of four draws that miss the
    largest logit it is a third of that (Heun's third-order method), which the gradient ignores. Weights are not
    renormalised.
    """

    reads = CAPACITY_READS | {
        "routed_scaling_factor",
        "router_jitter_noise",
        "router_gradient",
        "router_aux_loss_scope",
    }
    norm_topk_prob_default = False

    @classmethod
    def validate(cls, config) -> None:
        if (
            config.scoring_func != "softmax"
            or config.norm_topk_prob
            or config.router_selection_bias
            or config.n_group > 1
        ):
            raise ValueError(
                "router_gradient='sparsemixer' draws from a softmax over all experts and does not renormalise: set "
                "scoring_func='softmax', norm_topk_prob=False, router_selection_bias=False and n_group=1."
            )

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return fp32_linear(hidden_states, self.weight)

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        remaining, index, weight = logits, [], []
        for _ in range(self.top_k):
            chosen, multiplier = self.draw(logits, remaining)
            index.append(chosen)
            weight.append(multiplier)
            remaining = remaining.scatter(-1, chosen, float("-inf"))
        return Routing(logits, self.scaling * torch.cat(weight, -1), torch.cat(index, -1), logits.softmax(dim=-1))

    def draw(self, logits: torch.Tensor, remaining: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws an expert (T, 1) among those whose logit in `remaining` (T, E) is not -inf; returns expert and weight (T, 1)."""
        with torch.no_grad():
            best, chosen = remaining.max(dim=-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter_noise
        probs = remaining.masked_fill(far, float("-inf")).softmax(dim=-1)
        if not self.training:
            return chosen, probs.gather(-1, chosen)
        with torch.no_grad():
            likeliest = chosen
            chosen = (probs.log() - torch.empty_like(probs).exponential_().log()).argmax(dim=-1, keepdim=True)
            whole = (chosen == likeliest) | (torch.rand_like(best) > 0.75)
        multiplier = probs.gather(-1, chosen)
        return chosen, multiplier - (multiplier * (~whole * (2 / 3))).detach()


class HierarchicalRouter(Router):
    """Chooses `topk_group` of `n_group` groups by one gate, then experts of each chosen group by the group's gate.

    It is the hierarchical mixture of Shazeer et al. (arXiv:1701.06538, appendix B). The weight of an expert is the product
    of two softmaxes, of its group over the chosen groups and of the expert over the chosen experts of the group; without
    `norm_topk_prob` each softmax is over all groups, and over all experts of the group. The gates of other groups are not
    computed: H (G + topk_group * E / G) products instead of H E. Their experts have the logit -inf and the probability 0.
    """

    reads = CAPACITY_READS | {
        "norm_topk_prob",
        "routed_scaling_factor",
        "router_gradient",
        "n_group",
        "topk_group",
        "router_aux_loss_scope",
    }

    @classmethod
    def validate(cls, config) -> None:
        if config.n_group < 2 or config.num_experts_per_tok % config.topk_group:
            raise ValueError(
                f"router_type='hierarchical' needs n_group of at least 2 and num_experts_per_tok "
                f"({config.num_experts_per_tok}) a multiple of topk_group ({config.topk_group})."
            )
        if config.scoring_func != "softmax":
            raise ValueError("router_type='hierarchical' is a product of softmaxes: set scoring_func='softmax'.")

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.group_weight = nn.Parameter(torch.empty(self.n_group, config.hidden_size))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.group_weight, mean=0.0, std=std)

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        outer = fp32_linear(hidden_states, self.group_weight)  # (T, G)
        group = outer.detach().topk(self.topk_group, dim=-1).indices  # (T, k1)
        inner = self.inner_logits(hidden_states, group)  # (T, k1, E / G)
        best = inner.detach().topk(self.top_k // self.topk_group, dim=-1).indices  # (T, k1, k2)
        size = inner.shape[-1]
        outer_gate, inner_gate = outer.softmax(dim=-1).gather(-1, group), inner.softmax(dim=-1)
        weight = outer_gate[..., None] * inner_gate.gather(-1, best)
        if self.norm_topk_prob:
            weight = outer.gather(-1, group).softmax(dim=-1)[..., None] * inner.gather(-1, best).softmax(dim=-1)
        index = (group[..., None] * size + best).flatten(1)

        def spread(values: torch.Tensor, fill: float) -> torch.Tensor:
            """Puts values (T, k1, E / G) into the columns of their experts in (T, E)."""
            places = (group[..., None] * size + torch.arange(size, device=group.device)).flatten(1)
            return values.new_full((len(values), self.num_experts), fill).scatter(-1, places, values.flatten(1))

        probs = spread(renormalise(outer_gate)[..., None] * inner_gate, 0.0)
        logits = spread(outer.gather(-1, group)[..., None] + inner, float("-inf"))
        return Routing(logits, weight.flatten(1) * self.scaling, index, probs)

    def dense_weight(self, routing: Routing) -> torch.Tensor:
        """Returns the weights (T, E) that a token would have with every expert of the chosen groups."""
        return routing.probs * self.scaling

    def inner_logits(self, hidden_states: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Returns the logits (T, k1, E / G) of the experts in groups (T, k1)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        order = group.flatten().argsort(stable=True)
        counts = group.new_zeros(self.n_group).scatter_add(0, group.flatten(), torch.ones_like(group).flatten())
        gates = self.weight.to(dtype).unflatten(0, (self.n_group, -1)).transpose(1, 2)  # (G, H, E / G)
        tokens = hidden_states[order // self.topk_group].to(dtype)
        # transformers' grouped product serves any dtype and size, and is traced as one operator
        sorted_logits = torch.ops.transformers.grouped_mm_fallback(tokens, gates, counts.cumsum(0).to(torch.int32))
        return torch.empty_like(sorted_logits).index_copy(0, order, sorted_logits).unflatten(0, group.shape)
