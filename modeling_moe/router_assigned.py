# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Routers that choose by the token's id or its task, or by nothing at all: no gate reads the token to choose experts.

# T tokens, H hidden, E experts, Z experts without weights (null and copy), K slots per token, N tasks
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fields import Range, setting
from .router import CAPACITY_READS, Router, Routing, RoutingContext, fp32_linear, renormalise
from .router_topk import SELECTION_READS, TopKRouter


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class AssignedFields:
    """Routers by token id or task."""

    hash_seed: int = setting(
        0, "The seed of the tables from token ids to experts.", Range(0, 2**32), effect="detail", by_router=True
    )
    num_tasks: int = setting(
        1, "The number of tasks that task_ids can name.", Range(1, 2**16), effect="detail", by_router=True
    )


def hash_table(vocab_size: int, num_experts: int, top_k: int, seed: int, counts: torch.Tensor | None = None):
    """Experts (V, K) of each token id for [`HashRouter`], distinct in a row.

    Args:
        vocab_size, num_experts, top_k: V, E and K.
        seed: of the random choice.
        counts: (V,), how often each id occurs: then ids go, most frequent first, to the experts that have received the
            fewest tokens so far ("balanced" hashing, arXiv:2106.04426); None draws at random.

    Returns:
        (V, K) int64 on the CPU.

    Raises:
        ValueError: if `counts` has not one entry for each token id.
    """
    if counts is not None and counts.shape != (vocab_size,):
        raise ValueError(f"counts has shape {tuple(counts.shape)}: give one for each of the {vocab_size} token ids.")
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(vocab_size, num_experts, generator=generator)
    if counts is None:
        return draw.topk(top_k, dim=-1).indices
    table = torch.empty(vocab_size, top_k, dtype=torch.long)
    received = torch.zeros(num_experts, dtype=torch.float64)
    for token in counts.argsort(descending=True, stable=True).tolist():
        # the draw breaks ties
        table[token] = (received + 1e-9 * draw[token]).topk(top_k, largest=False).indices
        received[table[token]] += counts[token]
    return table


class HashRouter(Router):
    """A fixed table from token ids to experts, each with weight 1 / K (Roller et al., arXiv:2106.04426); no gate.

    The table is random, its seed `hash_seed` and the layer; [`set_counts`](HashRouter.set_counts) makes it a balanced one.
    It is saved with the model. `hash_scored` is DeepSeek-V4's: a learned gate weighs the experts of the table.
    """

    reads = CAPACITY_READS | {"routed_scaling_factor", "hash_seed", "router_aux_loss_scope"}
    scored = False

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        if not self.scored:
            self.weight = None
        # one table for each layer
        self.seed = config.hash_seed * 10007 + layer_idx
        self.table = nn.Buffer(torch.zeros(config.vocab_size, self.top_k, dtype=torch.long))

    def init_weights(self, std: float) -> None:
        if self.scored:
            super().init_weights(std)
        init.copy_(self.table, hash_table(len(self.table), self.num_experts, self.top_k, self.seed))

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int) -> None:
        """Gives new token ids experts by the layer's seed; ids that were there keep theirs."""
        old = min(vocab_size, len(self.table))
        if self.table.is_meta:
            self.table = nn.Buffer(self.table.new_empty(vocab_size, self.top_k))
            return
        table = hash_table(vocab_size, self.num_experts, self.top_k, self.seed).to(self.table.device)
        table[:old] = self.table[:old]
        self.table = nn.Buffer(table)

    @torch.no_grad()
    def set_counts(self, counts: torch.Tensor) -> None:
        """Balances the table for token ids that occur `counts` (V,) times."""
        self.table.copy_(hash_table(len(self.table), self.num_experts, self.top_k, self.seed, counts.cpu()))

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        """The routing of tokens (T, H).

        Raises:
            ValueError: without token ids.
        """
        if context.input_ids is None:
            raise ValueError("a hash router chooses by token id: give input_ids, not inputs_embeds alone.")
        index = self.table[context.input_ids]
        if self.scored:
            logits = self.logits(hidden_states, context)
            scores, probs = self.score(logits)
            return Routing(logits, self.weigh(scores, index), index, probs)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        share = torch.full(index.shape, 1 / self.top_k, dtype=dtype, device=index.device)
        logits = share.new_zeros(len(index), self.num_experts)
        return Routing(logits, share * self.scaling, index, logits.scatter(-1, index, share))


class ScoredHashRouter(HashRouter):
    """DeepSeek-V4's first layers: the table chooses, a learned gate weighs. See [`HashRouter`]."""

    reads = Router.reads | {"hash_seed"}
    scored = True


def task_of(context: RoutingContext) -> torch.Tensor:
    """Task (T,) of each token.

    Raises:
        ValueError: if the batch names none.
    """
    if context.task_ids is None:
        raise ValueError("this router chooses by task: pass task_ids, one for each sequence of the batch.")
    return context.task_ids


class TaskRouter(TopKRouter):
    """Routes whole sequences by their task: the gate sees a learned embedding of it in the place of the token.

    Task-level routing (Kudugunta et al., arXiv:2110.03742): all tokens of a task share K experts, which
    [`~modeling_moe.resizing.extract_task`] takes out as a model of its own.
    """

    reads = (Router.reads | SELECTION_READS | {"num_tasks"}) - {"router_bias"}
    required_input = "task_ids"

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.task_embedding = nn.Parameter(torch.empty(config.num_tasks, config.hidden_size))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.task_embedding)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        task = task_of(context)
        # product first, so that a token's logits are the same in every batch; of copies, since the last bit of a small
        # product depends on where its operands lie, and those of a loaded checkpoint lie in the file
        return fp32_linear(self.jittered(self.task_embedding.clone()), self.weight.clone(), self.bias)[task]


class MMoERouter(TopKRouter):
    """A gate for each task over shared experts (MMoE, Ma et al., KDD 2018).

    The paper mixes all experts: `num_experts_per_tok=num_experts`; fewer make it sparse.
    """

    reads = (Router.reads | SELECTION_READS | {"num_tasks"}) - {"router_bias"}
    required_input = "task_ids"

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.num_tasks = config.num_tasks
        self.weight = nn.Parameter(torch.empty(self.num_tasks * self.num_outputs, config.hidden_size))

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        task = task_of(context)
        logits = super().logits(hidden_states, context).unflatten(-1, (self.num_tasks, -1))  # (T, N, E)
        return logits.gather(1, task[:, None, None].expand(-1, 1, self.num_outputs)).squeeze(1)


class UniformRouter(Router):
    """Every token to every expert, with one weight for each expert that no token changes: what remains of a task.

    The weights are `expert_weight` (E,), a parameter.
    """

    reads = (CAPACITY_READS - {"capacity_priority"}) | {"routed_scaling_factor"}

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.weight = None
        self.expert_weight = nn.Parameter(torch.empty(self.num_experts))

    @classmethod
    def validate(cls, config) -> None:
        if config.num_experts_per_tok != config.num_experts:
            raise ValueError("router_type='uniform' uses all experts: set num_experts_per_tok to num_experts.")

    def init_weights(self, std: float) -> None:
        init.constant_(self.expert_weight, 1 / self.num_experts)

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weight = self.expert_weight.to(dtype).expand(len(hidden_states), -1)
        index = torch.arange(self.num_experts, device=weight.device).expand_as(weight)
        return Routing(weight, weight * self.scaling, index, renormalise(weight))

    def dense_weight(self, routing: Routing) -> torch.Tensor:
        """The weights (T, E): every expert is chosen."""
        return routing.weight
