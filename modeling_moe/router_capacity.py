# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module limits the number of a sequence's tokens that an expert takes, and drops assignments beyond the limit.

A dropped assignment adds nothing to the token's output, and a token without assignments passes on by the residual
connection. Each sequence is counted by itself, also in a packed row. Padding is not counted, and experts without weights
have no limit.

# B rows, S tokens per row, T = B*S tokens, E experts, Z experts without weights, K choices per token
"""

from dataclasses import dataclass
from typing import Any, Literal

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
    """These fields determine how many tokens an expert takes."""

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


# a limit that no sequence reaches, small enough for the shifts of [`running_min`]
_MANY = 2**38


class Capacity:
    """Drops the assignments of a routing that exceed the experts' capacity.

    The capacity of an expert is `ceil(factor * n * K / E)` for a sequence of n tokens (Megatron, DeepSpeed), or
    `ceil(factor * n / E)` without `capacity_includes_k` (Switch, arXiv:2101.03961, eq. 3). With `capacity_running` n is the
    number of tokens so far. `expert_capacity` sets a constant instead. The running and the constant capacity, filled in the
    order of the tokens, give a token the same experts whatever follows, in decoding as in one forward pass.
    """

    def __init__(self, config: Any, layer_idx: int = 0):
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.factors = {True: config.capacity_factor, False: config.eval_capacity_factor}
        self.absolute, self.running = config.expert_capacity, config.capacity_running
        self.per_token = self.top_k if config.capacity_includes_k else 1
        self.priority = config.capacity_priority
        # whether earlier tokens of a sequence, known to the cache alone, count
        self.remembers = self.priority == "token" and (self.absolute is not None or self.running)
        self.history = history_layer(config, layer_idx)

    def __call__(self, routing: Routing, context: RoutingContext, training: bool) -> Routing:
        """Returns the routing of T tokens, in which assignments beyond the capacity are empty.

        Raises:
            ValueError: for a static cache, if earlier tokens count.
        """
        factor = self.factors[training]
        if factor is None and self.absolute is None:
            return routing
        if len(routing.index) == context.batch_size and not self.remembers:
            return routing  # the only token of a sequence exceeds no capacity
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
        """Returns the capacity of an expert for sequences of `tokens` tokens."""
        if self.absolute is not None:
            return torch.full_like(tokens, min(self.absolute, _MANY))
        # 0.55 * 100 is 55.00000000000001, and the capacity is 55
        places = factor * (tokens.double() * self.per_token / self.num_experts)
        return (places - 1e-9).ceil().clamp(min=1, max=_MANY).to(tokens.dtype)

    def _in_order(
        self, index: torch.Tensor, real: torch.Tensor, factor: float | None, context: RoutingContext
    ) -> torch.Tensor:
        """Marks the assignments (T, K) that are kept if tokens come one after another, each with all of its experts.

        An expert that has taken `a` tokens takes the next token if a is below the limit: `a' = min(a + 1, limit)`. As the
        limit never falls, `a_t = n_t + min(a_0, min_(s <= t) (limit_s - n_s))`, n_t the number of tokens that have chosen
        the expert so far.
        """
        begins = context.by_row(context.begins)  # (B, S)
        wanted = torch.zeros(len(real), self.num_experts + 1, device=index.device, dtype=torch.long)
        wanted = running_sum(context.by_row(wanted.scatter(-1, index, 1)[..., :-1]), begins)  # (B, S, E)
        tokens, taken = running_sum(context.by_row(real), begins), torch.zeros_like(wanted)
        cache = context.cache if self.remembers else None
        if cache is not None and len(cache.layers) > self.history and cache.layers[self.history].get_seq_length():
            before = cache.layers[self.history].keys[:, 0, -1:].long()
            if begins is not None:
                # the cache holds the sequence that the beginning of a row continues
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
        """Marks the assignments (T, K) that are kept if all first choices of a sequence come before all second choices.

        GShard (arXiv:2006.16668). With `capacity_priority="probability"` tokens come in the order of their largest weight
        (V-MoE, arXiv:2106.05974).
        """
        tokens, choices = index.shape
        order = torch.arange(tokens, device=index.device)
        if self.priority == "probability":
            order = weight.amax(dim=-1).argsort(descending=True, stable=True)
        token, expert = order.repeat(choices), index[order].T.flatten()  # (K * T), a queue of all assignments
        queue = sequence[token] * (self.num_experts + 1) + expert
        by_queue = queue.argsort(stable=True)
        # the rank of an assignment is the distance from the beginning of its queue
        queue, place = queue[by_queue], torch.arange(len(queue), device=index.device)
        heads = torch.nn.functional.pad(queue.diff() != 0, (1, 0), value=True)
        rank = place - place.where(heads, 0).cummax(dim=0).values
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(0, by_queue, rank < limit[token[by_queue]])
        return torch.zeros_like(index, dtype=torch.bool).index_copy(0, order, kept.view(choices, tokens).T)


def _totals(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Returns the sum of `values` (T,) over each token's sequence: (T,)."""
    return torch.zeros_like(values).scatter_add(0, sequence, values)[sequence]


def count_dropped(before: Routing, after: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the number of assignments that capacity has dropped and the number before capacity, padding excluded: (2,)."""
    empty = before.logits.shape[-1]
    had = before.index < empty
    if token_mask is not None:
        had = had & (token_mask > 0)[:, None]
    return torch.stack([(had & (after.index == empty)).sum(), had.sum()]).to(before.logits.dtype)
