# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How many tokens of a sequence an expert takes, and which ones it drops: the output of a dropped slot is 0, so the token
passes on its residual.

Each sequence of the batch is counted by itself, padding counts for nothing, and experts without weights are never full.

# B sequences, S tokens of each, T = B*S, E experts, Z experts without weights, K slots per token
"""

import torch

from .routing import Routing, RoutingContext, extend_history, history_slot


class Capacity:
    """Limits a routing by the fields `capacity_factor`, `eval_capacity_factor`, `expert_capacity`, `capacity_running`,
    `capacity_includes_k` and `capacity_priority` of the configuration.

    The limit is `ceil(factor * A / E)` with A the assignments `n K` of a sequence's n tokens (Megatron, DeepSpeed), or n
    without `capacity_includes_k` (Switch, arXiv:2101.03961, eq. 3); or the same with the tokens so far in the place of n
    (`capacity_running`); or `expert_capacity`. The last two, with tokens in their order, give a token the same experts
    whatever follows it, in decoding as in one pass.
    """

    def __init__(self, config, layer_idx: int = 0):
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.factors = {True: config.capacity_factor, False: config.eval_capacity_factor}
        self.absolute, self.running = config.expert_capacity, config.capacity_running
        self.per_token = self.top_k if config.capacity_includes_k else 1
        self.priority = config.capacity_priority
        self.history = history_slot(config, layer_idx)

    def __call__(self, routing: Routing, context: RoutingContext, training: bool) -> Routing:
        """The routing of T tokens with the slots that found no room emptied.

        Raises:
            ValueError: for a static cache, if the limit counts earlier tokens.
        """
        factor = self.factors[training]
        if factor is None and self.absolute is None:
            return routing
        real = torch.ones_like(routing.index[:, 0]) if context.token_mask is None else (context.token_mask > 0).long()
        real = real.view(context.batch_size, -1)  # (B, S)
        index = routing.index.unflatten(0, real.shape)  # (B, S, K)
        counted = (index < self.num_experts) & (real[..., None] > 0)
        index = index.where(counted, self.num_experts)
        if self.priority != "token":
            kept = self._by_priority(index, self._limit(real.sum(dim=1), factor), routing.weight.detach())
        else:
            remembers = self.absolute is not None or self.running
            kept = self._in_order(index, real, factor, context.cache if remembers else None)
        kept = (kept | ~counted).flatten(0, 1)
        empty = routing.logits.shape[-1]
        return routing._replace(index=routing.index.where(kept, empty), weight=routing.weight.where(kept, 0.0))

    def _limit(self, tokens: torch.Tensor, factor: float | None) -> torch.Tensor:
        """Places of each expert for so many tokens of a sequence."""
        if self.absolute is not None:
            return torch.full_like(tokens, self.absolute)
        # 0.55 * 100 is 55.00000000000001, which is no 56 places
        places = factor * (tokens.double() * self.per_token / self.num_experts)
        return (places - 1e-9).ceil().to(tokens.dtype)

    def _in_order(self, index: torch.Tensor, real: torch.Tensor, factor: float | None, cache) -> torch.Tensor:
        """Slots (B, S, K) that find room if tokens come one after another, with all their experts.

        An expert that has taken `a` tokens takes the next one if a is below its limit: `a' = min(a + 1, limit)`. As the
        limit never falls, `a_t = n_t + min(a_0, min_(s <= t) (limit_s - n_s))` with n_t the tokens that wanted it so far.
        """
        wanted = torch.zeros(*real.shape, self.num_experts + 1, device=index.device, dtype=torch.long)
        wanted = wanted.scatter(-1, index, 1)[..., :-1].cumsum(dim=1)  # (B, S, E)
        tokens, taken = real.cumsum(dim=1), torch.zeros_like(wanted[:, :1])
        if cache is not None:
            past = cache.layers[self.history].keys if len(cache.layers) > self.history else None
            if past is not None and past.shape[-2]:
                before = past[:, 0, -1:].long()
                taken, tokens = before[..., :-1], tokens + before[..., -1]
        if self.absolute is None and not self.running:
            limit = self._limit(real.sum(dim=1), factor)[:, None, None]
        else:
            limit = self._limit(tokens, factor)[..., None]
        room = (limit - wanted).cummin(dim=1).values
        accepted = wanted + torch.minimum(taken, room)
        if cache is not None:
            extend_history(cache, self.history, torch.cat([accepted, tokens[..., None]], dim=-1).float())
        grew = accepted > torch.cat([taken, accepted[:, :-1]], dim=1)
        return torch.nn.functional.pad(grew, (0, 1)).gather(-1, index)

    def _by_priority(self, index: torch.Tensor, limit: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Slots (B, S, K) that find room if all first choices come before all second ones (GShard, arXiv:2006.16668), and
        with `capacity_priority="probability"` tokens in the order of their largest weight (V-MoE, arXiv:2106.05974)."""
        batch, sequence, slots = index.shape
        order = torch.arange(sequence, device=index.device).expand(batch, -1)
        if self.priority == "probability":
            order = weight.view(index.shape).amax(dim=-1).argsort(dim=1, descending=True, stable=True)
        queue = index.gather(1, order[..., None].expand_as(index)).transpose(1, 2).flatten(1)  # (B, K * S)
        wanted = torch.nn.functional.one_hot(queue, self.num_experts + 1).cumsum(dim=1)
        rank = wanted.gather(-1, queue[..., None]).squeeze(-1)
        kept = (rank <= limit[:, None]).view(batch, slots, sequence).transpose(1, 2)
        return torch.zeros_like(kept).scatter(1, order[..., None].expand_as(kept), kept)


def count_dropped(before: Routing, after: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(2,): slots of tokens that count that had an expert before and have none after, and those that had one before."""
    empty = before.logits.shape[-1]
    had = before.index < empty
    if token_mask is not None:
        had = had & (token_mask > 0)[:, None]
    return torch.stack([(had & (after.index == empty)).sum(), had.sum()]).to(before.logits.dtype)
