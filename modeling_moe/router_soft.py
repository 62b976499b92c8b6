# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines soft routers: experts process weighted averages of tokens (Soft MoE), or tokens use a weighted average
of experts (Lory).

Every token uses every expert with `router_type="topk"` and `num_experts_per_tok=num_experts` too.

# B rows, S tokens per row, T = B*S tokens, H hidden, E experts; here a slot is one input of an expert in Soft MoE
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fields import Range, setting
from .model_packing import running_sum
from .router import Router, Routing, RoutingContext, extend_history, fp32_linear, history_layer, renormalise


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class SoftFields:
    """These fields configure routers that mix tokens or experts."""

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
    """Lets each expert process `slots_per_expert` weighted averages of a sequence's tokens (Soft MoE, arXiv:2308.00951, eq. 1-3).

    The logits are `scale * normed(x) normed(phi)^T` (section 2.3). A softmax over tokens makes a slot, a softmax over slots
    makes a token's output. Every slot averages all tokens, so that the router is not causal. The routing holds each
    expert's share of a token's output.
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
        """Returns the logits (T, E * slots) of tokens (T, H)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        normalize = nn.functional.normalize
        return self.scale.to(dtype) * fp32_linear(
            normalize(hidden_states.to(dtype), dim=-1), normalize(self.weight.to(dtype), dim=-1)
        )

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        """Returns each expert's share of a token's output; `mixture` holds the logits (T, E * slots)."""
        probs = logits.softmax(dim=-1).unflatten(-1, (self.num_experts, -1)).sum(dim=-1)
        index = torch.arange(self.num_experts, device=logits.device).expand_as(probs)
        by_expert = logits.unflatten(-1, (self.num_experts, -1)).logsumexp(dim=-1)
        return Routing(by_expert, probs * self.scaling, index, probs, mixture=logits)

    @staticmethod
    def mix(
        experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext, config: Any
    ) -> torch.Tensor:
        """Returns the output (T, H): for each token the average of the experts' outputs for the slots of the token's sequence."""
        logits: Any = routing.mixture
        place, rows, length = _sequence_rows(context, len(logits), logits.device)

        def spread(values: torch.Tensor) -> torch.Tensor:
            """Puts values (T, N) into (rows, length, N), each sequence in a row that ends with zeros."""
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


class SequenceRows(NamedTuple):
    """The places of tokens in a batch in which each sequence has a row.

    Attributes:
        place: (T,) int64, `row * length + column` of each token.
        rows: number of rows.
        length: number of columns.
    """

    place: torch.Tensor
    rows: int
    length: int


def _sequence_rows(context: RoutingContext, tokens: int, device: torch.device) -> SequenceRows:
    """Finds the places of T tokens in rows of one sequence each; it waits for the device if rows are packed."""
    flat = torch.arange(tokens, device=device)
    if context.begins is None:
        return SequenceRows(flat, context.batch_size, tokens // context.batch_size)
    sequence = context.sequences(tokens, device)
    _, row, counts = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    length = int(counts.max())
    return SequenceRows(row * length + flat - sequence, len(counts), length)


class LoryRouter(Router):
    """Merges one expert for each segment of a sequence, with weights from the segment before (Lory, arXiv:2405.03133).

    The gate reads the mean of the `segment_length` tokens before the segment. The paper lets the first segment read itself;
    here the first segment mixes all experts evenly, so that no token sees a later one and the prompt's length has no effect.
    """

    reads = frozenset({"scoring_func", "norm_topk_prob", "routed_scaling_factor", "segment_length"})
    per_token = False
    uses_all_experts = True

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.segment_length = config.segment_length
        self.history = history_layer(config, layer_idx)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Returns the logits (T, E), equal for all tokens of a segment."""
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
        # shifted by one: segment m reads the mean of segment m - 1
        means = past.new_zeros(len(past), bound + 1, past.shape[-1] - 1, dtype=dtype)
        means = means.scatter_add(
            1, (segment + 1)[..., None].expand_as(past[..., :-1]), past[..., :-1].to(means.dtype)
        )
        # the first segment of a sequence reads nothing
        seen = torch.zeros_like(means[..., 0]).scatter(1, segment, has_past.to(means.dtype))
        means = means[..., :-1] / means[..., -1:].clamp(min=1) * seen[..., None]
        logits = fp32_linear(means, self.weight)  # (B, segments + 1, E)
        current = segment[:, -tokens.shape[1] :, None].expand(-1, -1, self.num_experts)
        return logits.gather(1, current).flatten(0, 1)

    def segments(self, real: torch.Tensor, begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers the segments of each row, and marks the tokens that have a segment of the same sequence before them.

        Args:
            real: (B, S), 0 at padding, which does not fill a segment.
            begins: (B, S) bool, true where a sequence begins.

        Returns:
            (B, S) int64 segment of each token, counted through the row, and (B, S) bool.
        """
        within = (running_sum((real > 0).long(), begins) - 1).clamp(min=0) // self.segment_length
        opens = (within[:, 1:] != within[:, :-1]) | begins[:, 1:]
        return nn.functional.pad(opens.long().cumsum(dim=1), (1, 0)), within > 0

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return torch.arange(self.num_experts, device=scores.device).expand_as(scores)

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        """Routes to all experts; `mixture` holds the gates (T, E) by which the experts' weights are merged."""
        routing = super().route(logits, context)
        return routing._replace(weight=routing.weight * self.scaling, mixture=routing.weight)

    def weigh(self, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Returns the gates (T, E)."""
        return renormalise(scores) if self.norm_topk_prob else scores

    @staticmethod
    def mix(
        experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext, config: Any
    ) -> torch.Tensor:
        """Returns the output (T, H) of merged experts, whose weights are averages of all experts' weights."""
        gates: Any = routing.mixture
        # tokens of a sequence with equal gates share a merged expert and the gradient of the merged expert
        sequence = context.sequences(len(gates), gates.device)
        keys = torch.cat([sequence[:, None].to(gates.dtype), gates.detach()], dim=-1)
        rows, group, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        mean = gates.new_zeros(len(rows), config.num_experts).index_add(0, group, gates) / counts[:, None]
        # the value comes from the rows, since a mean of thousands of equal rows would be rounded
        gates = rows[:, 1:] + (mean - mean.detach())
        factor = torch.full_like(routing.weight[:, :1], config.routed_scaling_factor)
        return experts(hidden_states, group[:, None], factor, gates=gates)
