# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Mixtures without a choice: experts that see averages of tokens, and tokens that see averages of experts.

The third of the kind, every expert for every token, is `router_type="topk"` with `num_experts_per_tok=num_experts`.

# B rows, S tokens of each, T = B*S, H hidden, E experts
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fields import Range, setting
from .model_packing import running_sum
from .router import Router, Routing, RoutingContext, extend_history, fp32_linear, history_layer, renormalise


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class SoftFields:
    """Soft routers."""

    slots_per_expert: int = setting(
        1,
        "The number of weighted averages of tokens that one expert of router_type='soft_moe' processes.",
        Range(1, 2**16),
        effect="detail",
        by_router=True,
    )
    segment_length: int = setting(
        256,
        "The number of consecutive tokens that share a merged expert with router_type='lory'.",
        Range(1, 2**31),
        effect="detail",
        by_router=True,
    )


class SoftMoERouter(Router):
    """Each expert processes `slots_per_expert` weighted means of a sequence's tokens (Soft MoE, arXiv:2308.00951, eq. 1-3).

    `L = scale * normed(x) normed(phi)^T` (section 2.3), softmax over the tokens to build a slot, over the slots to give
    each token its output. Every slot holds all tokens: not causal. `Routing` tells each expert's share of a token's output.
    """

    reads = frozenset({"routed_scaling_factor", "slots_per_expert"})
    causal = False
    per_token = False
    uses_all_experts = True

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.slots = config.slots_per_expert
        self.weight = nn.Parameter(torch.empty(self.num_experts * self.slots, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(1))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.ones_(self.scale)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """(T, E * slots)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        normalize = nn.functional.normalize
        return self.scale.to(dtype) * fp32_linear(
            normalize(hidden_states.to(dtype), dim=-1), normalize(self.weight.to(dtype), dim=-1)
        )

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        """Each expert's share of a token's output; `mixture` holds the logits (T, E * slots) themselves."""
        probs = logits.softmax(dim=-1).unflatten(-1, (self.num_experts, -1)).sum(dim=-1)
        index = torch.arange(self.num_experts, device=logits.device).expand_as(probs)
        by_expert = logits.unflatten(-1, (self.num_experts, -1)).logsumexp(dim=-1)
        return Routing(by_expert, probs * self.scaling, index, probs, mixture=logits)

    @staticmethod
    def mix(
        experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext, config: Any
    ) -> torch.Tensor:
        """Output (T, H): each token's mean of what the experts make of its sequence's slots."""
        logits: Any = routing.mixture
        place, (rows, length) = _alone(context, len(logits), logits.device)

        def spread(values: torch.Tensor) -> torch.Tensor:
            """(T, N) with each sequence in a row of its own, zeros behind it."""
            return (
                values.new_zeros(rows * length, values.shape[-1]).index_copy(0, place, values).view(rows, length, -1)
            )

        real = torch.ones_like(logits[:, :1]) if context.token_mask is None else context.token_mask[:, None].to(logits)
        dispatch = spread(logits).masked_fill(spread(real) == 0, torch.finfo(logits.dtype).min).softmax(dim=1)
        slots = (dispatch.transpose(1, 2) @ spread(hidden_states).to(logits.dtype)).flatten(
            0, 1
        )  # (rows * E * slots, H)
        index = torch.arange(config.num_experts, device=slots.device).repeat_interleave(config.slots_per_expert)
        index = index.repeat(rows)[:, None]
        output = experts(slots.to(hidden_states.dtype), index, torch.ones_like(index, dtype=logits.dtype))
        combine = spread(logits.softmax(dim=-1))
        output = combine @ output.unflatten(0, (rows, -1)).to(logits.dtype)
        return (output.flatten(0, 1)[place] * config.routed_scaling_factor).to(hidden_states.dtype)


def _alone(context: RoutingContext, tokens: int, device: torch.device) -> tuple[torch.Tensor, tuple[int, int]]:
    """Places (T,) of the tokens where each sequence has a row of its own, and the number of these rows and their length.

    It waits for the device where a row can hold several sequences.
    """
    flat = torch.arange(tokens, device=device)
    if context.begins is None:
        return flat, (context.batch_size, tokens // context.batch_size)
    sequence = context.sequences(tokens, device)
    _, row, counts = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    length = int(counts.max())
    return row * length + flat - sequence, (len(counts), length)


class LoryRouter(Router):
    """One merged expert for each segment of a sequence, its weights mixed by the segment before (Lory, arXiv:2405.03133).

    The gate is a softmax of the mean of the `segment_length` tokens before the segment. The paper lets the first segment
    see itself; here it mixes all experts evenly, so that no token sees a later one, nor does a prompt's length matter.
    """

    reads = frozenset({"scoring_func", "norm_topk_prob", "routed_scaling_factor", "segment_length"})
    per_token = False
    uses_all_experts = True

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.segment_length = config.segment_length
        self.history = history_layer(config, layer_idx)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """(T, E), equal for all tokens of a segment."""
        tokens = context.by_row(hidden_states)
        real = torch.ones_like(tokens[..., :1])
        if context.token_mask is not None:
            real = context.by_row(context.token_mask)[..., None].to(tokens.dtype)
        begins = (
            torch.zeros_like(real) if context.begins is None else context.by_row(context.begins)[..., None].to(real)
        )
        past = extend_history(context.cache, self.history, torch.cat([tokens * real, real, begins], dim=-1))
        segment, has_past = self.segments(past[..., -2], past[..., -1] > 0)  # (B, S')
        alone = context.begins is None and context.cache is None
        bound = (past.shape[1] - 1) // self.segment_length + 1 if alone else past.shape[1]
        dtype = torch.promote_types(past.dtype, torch.float32)
        # one further: what segment m - 1 sums to is what segment m sees
        means = past.new_zeros(len(past), bound + 1, past.shape[-1] - 1, dtype=dtype)
        means = means.scatter_add(
            1, (segment + 1)[..., None].expand_as(past[..., :-1]), past[..., :-1].to(means.dtype)
        )
        # a sequence's first segment sees nothing
        seen = torch.zeros_like(means[..., 0]).scatter(1, segment, has_past.to(means.dtype))
        means = means[..., :-1] / means[..., -1:].clamp(min=1) * seen[..., None]
        logits = fp32_linear(means, self.weight)  # (B, segments + 1, E)
        current = segment[:, -tokens.shape[1] :, None].expand(-1, -1, self.num_experts)
        return logits.gather(1, current).flatten(0, 1)

    def segments(self, real: torch.Tensor, begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment (B, S) of each token, counted through the row, and whether one of its sequence lies before (B, S).

        Args:
            real: (B, S), 0 at padding, with which no segment is filled.
            begins: (B, S) bool, whether a token begins a sequence.
        """
        within = (running_sum((real > 0).long(), begins) - 1).clamp(min=0) // self.segment_length
        opens = (within[:, 1:] != within[:, :-1]) | begins[:, 1:]
        return nn.functional.pad(opens.long().cumsum(dim=1), (1, 0)), within > 0

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return torch.arange(self.num_experts, device=scores.device).expand_as(scores)

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        """All experts; `mixture` holds the gates (T, E) by which their weights are mixed."""
        routing = super().route(logits, context)
        return routing._replace(weight=routing.weight * self.scaling, mixture=routing.weight)

    def weigh(self, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Gates (T, E)."""
        return renormalise(scores) if self.norm_topk_prob else scores

    @staticmethod
    def mix(
        experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext, config: Any
    ) -> torch.Tensor:
        """Output (T, H): that of the experts whose weights are the gates' means of all."""
        gates: Any = routing.mixture
        # tokens of a sequence with equal gates share a merged expert, and its gradient
        sequence = context.sequences(len(gates), gates.device)
        keys = torch.cat([sequence[:, None].to(gates.dtype), gates.detach()], dim=-1)
        rows, group, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        mean = gates.new_zeros(len(rows), config.num_experts).index_add(0, group, gates) / counts[:, None]
        # the value is the rows', which a mean of thousands would round
        gates = rows[:, 1:] + (mean - mean.detach())
        factor = torch.full_like(routing.weight[:, :1], config.routed_scaling_factor)
        return experts(hidden_states, group[:, None], factor, gates=gates)
