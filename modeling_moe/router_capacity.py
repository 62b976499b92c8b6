# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How many tokens of a sequence an expert takes, and which ones it drops: the output of a dropped slot is 0, so the token
passes on its residual.

Each sequence is counted by itself, alone in a row or packed with others; padding counts for nothing, and experts without
weights are never full.

# B rows, S tokens of each, T = B*S, E experts, Z experts without weights, K slots per token
"""

from dataclasses import dataclass
from typing import Literal

import torch

from .configuration_fields import POSITIVE, Condition, Range, setting
from .model_packing import running_min, running_sum
from .router import Routing, RoutingContext, extend_history, history_layer


_BY_FACTOR = Condition(lambda config: config.expert_capacity is None, "unset expert_capacity")
_HAS_FACTOR = Condition(
    lambda config: config.capacity_factor is not None or config.eval_capacity_factor is not None,
    "set capacity_factor or eval_capacity_factor",
)


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class CapacityFields:
    """Capacity."""

    capacity_factor: float | int | None = setting(
        None,
        "Limits in training the tokens that an expert takes of a sequence of n tokens to "
        "ceil(capacity_factor * n * num_experts_per_tok / num_experts); None sets no limit. A token whose assignments are all "
        "dropped passes on by the residual connection.",
        POSITIVE,
        effect="training",
        conditions=(_BY_FACTOR,),
        by_router=True,
    )
    eval_capacity_factor: float | int | None = setting(
        None,
        "Limits in evaluation the tokens that an expert takes of a sequence of n tokens to "
        "ceil(eval_capacity_factor * n * num_experts_per_tok / num_experts); None sets no limit.",
        POSITIVE,
        conditions=(_BY_FACTOR,),
        by_router=True,
    )
    expert_capacity: int | None = setting(
        None,
        "The number of tokens of a sequence that an expert takes, in training and evaluation; None sets no limit.",
        Range(1, 2**31),
        by_router=True,
    )
    capacity_running: bool = setting(
        False,
        "Computes the capacity from the number of tokens so far instead of the sequence's length, so that decoding token by "
        "token equals one forward pass.",
        effect="detail",
        conditions=(_BY_FACTOR, _HAS_FACTOR),
        by_router=True,
    )
    capacity_includes_k: bool = setting(
        True,
        "Multiplies the capacity by num_experts_per_tok (Megatron-LM); False leaves that factor out (Switch).",
        effect="detail",
        conditions=(
            _BY_FACTOR,
            _HAS_FACTOR,
            Condition(lambda config: config.num_experts_per_tok > 1, "set num_experts_per_tok above 1"),
        ),
        by_router=True,
    )
    capacity_priority: Literal["token", "k_major", "probability"] = setting(
        "token",
        'The order in which assignments fill an expert: "token" in the order of the sequence, "k_major" all first choices '
        'before all second ones (GShard), "probability" in the order of the tokens\' largest weight (V-MoE). The last two are '
        "not causal.",
        effect="detail",
        conditions=(
            Condition(
                lambda config: config.has_capacity, "set capacity_factor, eval_capacity_factor or expert_capacity"
            ),
        ),
        by_router=True,
    )


# places that no sequence fills, in integers that [`running_min`] can shift
_MANY = 2**38


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
        # whether earlier tokens of a sequence count that only a cache knows
        self.remembers = self.priority == "token" and (self.absolute is not None or self.running)
        self.history = history_layer(config, layer_idx)

    def __call__(self, routing: Routing, context: RoutingContext, training: bool) -> Routing:
        """The routing of T tokens with the slots that found no room emptied.

        Raises:
            ValueError: for a static cache, if the limit counts earlier tokens.
        """
        factor = self.factors[training]
        if factor is None and self.absolute is None:
            return routing
        if len(routing.index) == context.batch_size and not self.remembers:
            return routing  # the only token of each sequence finds room everywhere
        real = torch.ones_like(routing.index[:, 0]) if context.token_mask is None else (context.token_mask > 0).long()
        counted = (routing.index < self.num_experts) & (real[:, None] > 0)
        index = routing.index.where(counted, self.num_experts)
        if self.priority == "token":
            kept = self._in_order(index, real, factor, context)
        else:
            sequence = context.sequences(len(real), real.device)
            limit = self._limit(_totals(real, sequence), factor)
            kept = self._by_priority(index, sequence, limit, routing.weight.detach())
        kept = kept | ~counted
        empty = routing.logits.shape[-1]
        return routing._replace(index=routing.index.where(kept, empty), weight=routing.weight.where(kept, 0.0))

    def _limit(self, tokens: torch.Tensor, factor: float | None) -> torch.Tensor:
        """Places of each expert for so many tokens of a sequence."""
        if self.absolute is not None:
            return torch.full_like(tokens, min(self.absolute, _MANY))
        # 0.55 * 100 is 55.00000000000001, which is no 56 places
        places = factor * (tokens.double() * self.per_token / self.num_experts)
        return (places - 1e-9).ceil().clamp(min=1, max=_MANY).to(tokens.dtype)

    def _in_order(
        self, index: torch.Tensor, real: torch.Tensor, factor: float | None, context: RoutingContext
    ) -> torch.Tensor:
        """Slots (T, K) that find room if tokens come one after another, with all their experts.

        An expert that has taken `a` tokens takes the next one if a is below its limit: `a' = min(a + 1, limit)`. As the
        limit never falls, `a_t = n_t + min(a_0, min_(s <= t) (limit_s - n_s))` with n_t the tokens that wanted it so far.
        """
        begins = context.by_row(context.begins)  # (B, S)
        wanted = torch.zeros(len(real), self.num_experts + 1, device=index.device, dtype=torch.long)
        wanted = running_sum(context.by_row(wanted.scatter(-1, index, 1)[..., :-1]), begins)  # (B, S, E)
        tokens, taken = running_sum(context.by_row(real), begins), torch.zeros_like(wanted)
        cache = context.cache if self.remembers else None
        if cache is not None and len(cache.layers) > self.history and cache.layers[self.history].get_seq_length():
            before = cache.layers[self.history].keys[:, 0, -1:].long()
            if begins is not None:
                # what the cache holds is of the sequence that a row goes on with
                before = before * (begins.cumsum(dim=1) == 0)[..., None]
            taken, tokens = before[..., :-1].expand_as(wanted), tokens + before[..., -1]
        whole = tokens
        if not self.remembers:
            whole = context.by_row(_totals(real, context.sequences(len(real), real.device)))
        limit = self._limit(whole, factor)[..., None]
        accepted = wanted + torch.minimum(taken, running_min(limit - wanted, begins))
        if cache is not None:
            extend_history(cache, self.history, torch.cat([accepted, tokens[..., None]], dim=-1).float())
        previous = torch.cat([taken[:, :1], accepted[:, :-1]], dim=1)
        if begins is not None:
            previous = previous.where(~begins[..., None], taken)
        grew = (accepted > previous).flatten(0, 1)
        return torch.nn.functional.pad(grew, (0, 1)).gather(-1, index)

    def _by_priority(
        self, index: torch.Tensor, sequence: torch.Tensor, limit: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Slots (T, K) that find room if a sequence's first choices come before all its second ones (GShard,
        arXiv:2006.16668), and with `capacity_priority="probability"` tokens in the order of their largest weight (V-MoE,
        arXiv:2106.05974)."""
        tokens, slots = index.shape
        order = torch.arange(tokens, device=index.device)
        if self.priority == "probability":
            order = weight.amax(dim=-1).argsort(descending=True, stable=True)
        token, expert = order.repeat(slots), index[order].T.flatten()  # (K * T), a queue of all assignments
        queue = sequence[token] * (self.num_experts + 1) + expert
        by_queue = queue.argsort(stable=True)
        # an assignment's rank is its distance from where its queue begins
        queue, place = queue[by_queue], torch.arange(len(queue), device=index.device)
        heads = torch.nn.functional.pad(queue.diff() != 0, (1, 0), value=True)
        rank = place - place.where(heads, 0).cummax(dim=0).values
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(0, by_queue, rank < limit[token[by_queue]])
        return torch.zeros_like(index, dtype=torch.bool).index_copy(0, order, kept.view(slots, tokens).T)


def _totals(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Sum of `values` (T,) over each token's sequence, whose number is below T: (T,)."""
    return torch.zeros_like(values).scatter_add(0, sequence, values)[sequence]


def count_dropped(before: Routing, after: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(2,): slots of tokens that count that had an expert before and have none after, and those that had one before."""
    empty = before.logits.shape[-1]
    had = before.index < empty
    if token_mask is not None:
        had = had & (token_mask > 0)[:, None]
    return torch.stack([(had & (after.index == empty)).sum(), had.sum()]).to(before.logits.dtype)
