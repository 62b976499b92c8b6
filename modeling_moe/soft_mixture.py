# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Mixtures without a choice: experts that see averages of tokens, and tokens that see averages of experts.

The third of the kind, every expert for every token, is `router_type="topk"` with `num_experts_per_tok=num_experts`.

# B sequences, S tokens of each, T = B*S, H hidden, E experts
"""

import copy

import torch
from torch import nn
from transformers import initialization as init

from .routing import Router, Routing, RoutingContext, extend_history, fp32_linear, history_slot


class SoftRouter(Router):
    """Each expert processes `slots_per_expert` weighted means of a sequence's tokens (Soft MoE, arXiv:2308.00951, eq. 1-3).

    `L = scale * normed(x) normed(phi)^T` (section 2.3), softmax over the tokens to build a slot, over the slots to give
    each token its output. Every slot holds all tokens: not causal. `Routing` tells each expert's share of a token's output.
    """

    causal = False
    per_token = False

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
        probs = logits.softmax(dim=-1).unflatten(-1, (self.num_experts, -1)).sum(dim=-1)
        index = torch.arange(self.num_experts, device=logits.device).expand_as(probs)
        return Routing(logits.unflatten(-1, (self.num_experts, -1)).logsumexp(dim=-1), probs, index, probs)

    def mix(self, experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext):
        tokens = hidden_states.unflatten(0, (context.batch_size, -1))  # (B, S, H)
        logits = self.logits(hidden_states, context).unflatten(0, (context.batch_size, -1))  # (B, S, E * slots)
        combine = logits.softmax(dim=-1)
        if context.token_mask is not None:
            padding = context.token_mask.view(context.batch_size, -1, 1) == 0
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        slots = (logits.softmax(dim=1).transpose(1, 2) @ tokens.to(logits.dtype)).flatten(0, 1)  # (B * E * slots, H)
        index = torch.arange(self.num_experts, device=slots.device).repeat_interleave(self.slots)
        index = index.repeat(context.batch_size)[:, None]
        output = experts(slots.to(tokens.dtype), index, torch.ones_like(index, dtype=logits.dtype))
        output = combine @ output.unflatten(0, (context.batch_size, -1)).to(logits.dtype)
        return (output * self.scaling).to(tokens.dtype).flatten(0, 1)


class SegmentRouter(Router):
    """One merged expert for each segment of a sequence, its weights mixed by the segment before (Lory, arXiv:2405.03133).

    The gate is a softmax of the mean of the `segment_length` tokens before the segment. The paper lets the first segment
    see itself; here it mixes all experts evenly, so that no token sees a later one, nor does a prompt's length matter.
    """

    per_token = False

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.segment_length = config.segment_length
        self.history = history_slot(config, layer_idx)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        tokens = hidden_states.unflatten(0, (context.batch_size, -1))
        real = torch.ones_like(tokens[..., :1])
        if context.token_mask is not None:
            real = context.token_mask.view(*tokens.shape[:2], 1).to(tokens.dtype)
        past = extend_history(context.cache, self.history, torch.cat([tokens * real, real], dim=-1))  # (B, S', H + 1)
        segment = self.segments(past[..., -1])  # (B, S')
        means = past.new_zeros(
            len(past), int(segment.max()) + 2, past.shape[-1], dtype=torch.promote_types(past.dtype, torch.float32)
        )
        # one further: what segment m - 1 sums to is what segment m sees, the first one sees nothing
        means = means.scatter_add(1, (segment + 1)[..., None].expand_as(past), past.to(means.dtype))
        means = means[..., :-1] / means[..., -1:].clamp(min=1)
        logits = fp32_linear(means, self.weight)  # (B, segments + 1, E)
        current = segment[:, -tokens.shape[1] :, None].expand(-1, -1, self.num_experts)
        return logits.gather(1, current).flatten(0, 1)

    def segments(self, real: torch.Tensor) -> torch.Tensor:
        """Segment (B, S) of each token, counted from the first that is real (B, S)."""
        return ((real.float().cumsum(dim=1) - 1).clamp(min=0) // self.segment_length).long()

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return torch.arange(self.num_experts, device=scores.device).expand_as(scores)

    def mix(self, experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext):
        gates = routing.weight
        # tokens of a sequence with the same gates share a merged expert, and its gradient
        sequence = torch.arange(context.batch_size, device=gates.device).repeat_interleave(
            len(gates) // context.batch_size
        )
        keys = torch.cat([sequence[:, None].to(gates.dtype), gates.detach()], dim=-1)
        rows, group, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        mean = gates.new_zeros(len(rows), self.num_experts).index_add(0, group, gates) / counts[:, None]
        # the value is the rows', which a mean of thousands would round
        gates = rows[:, 1:] + (mean - mean.detach())
        return merge_experts(experts, gates)(hidden_states, group[:, None], torch.ones_like(routing.weight[:, :1]))


def merge_experts(experts: nn.Module, gates: torch.Tensor) -> nn.Module:
    """Experts whose weights are means of those given, by gates (G, E): G of them, computed the same way."""
    merged = copy.copy(experts)
    merged._parameters = {
        name: torch.tensordot(gates.to(parameter.dtype), parameter, dims=1)
        for name, parameter in experts.named_parameters(recurse=False)
    }
    merged.num_experts = len(gates)
    return merged
