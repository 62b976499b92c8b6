# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines routers that do not choose experts by the token's hidden state, but by its id, its task or nothing.

# T tokens, H hidden, V vocabulary, E experts, Z experts without weights (null and copy), K choices per token, N tasks
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fields import Range, setting
from .router import CAPACITY_READS, LOGIT_READS, Router, Routing, RoutingContext, fp32_linear, renormalise
from .router_topk import SELECTION_READS, TopKRouter


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class AssignedFields:
    """These fields configure routers that choose by token id or task."""

    hash_seed: int = setting(
        0, "The seed of the tables from token ids to experts.", Range(0, 2**32), effect="detail", by_router=True
    )
    num_tasks: int = setting(
        1, "The number of tasks that task_ids can name.", Range(1, 2**16), effect="detail", by_router=True
    )


def hash_table(
    vocab_size: int, num_experts: int, top_k: int, seed: int, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Chooses K distinct experts for each token id, for [`HashRouter`].

    Args:
        vocab_size: V.
        num_experts: E.
        top_k: K.
        seed: seed of the random choice.
        counts: (V,) frequency of each id, for "balanced" hashing (arXiv:2106.04426): ids choose, the most frequent first,
            the experts that have received the fewest tokens. None for a random choice.

    Returns:
        (V, K) int64 on the CPU.

    Raises:
        ValueError: if `counts` does not have V entries.
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
        # the random numbers break ties
        table[token] = (received + 1e-9 * draw[token]).topk(top_k, largest=False).indices
        received[table[token]] += counts[token]
    return table


class HashRouter(Router):
    """Looks up K experts for each token id in a fixed table, each with weight 1 / K (Roller et al., arXiv:2106.04426).

    The table is random, with a seed from `hash_seed` and the layer; [`set_counts`](HashRouter.set_counts) makes a balanced
    table. The table is saved with the model. There is no gate.
    """

    reads = CAPACITY_READS | {"routed_scaling_factor", "hash_seed", "router_aux_loss_scope"}
    differentiable = False
    scored = False

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        if not self.scored:
            self.register_parameter("weight", None)
        # one table for each layer
        self.seed = config.hash_seed * 10007 + layer_idx
        self.table = nn.Buffer(torch.zeros(config.vocab_size, self.top_k, dtype=torch.long))

    def init_weights(self, std: float) -> None:
        if self.scored:
            super().init_weights(std)
        init.copy_(self.table, hash_table(len(self.table), self.num_experts, self.top_k, self.seed))

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int) -> None:
        """Chooses experts for new token ids by the layer's seed; old ids keep their experts."""
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
        """Returns the routing of tokens (T, H).

        Raises:
            ValueError: if the model was given embeddings instead of token ids.
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
    """Looks up experts in the table of [`HashRouter`], and weighs them by a learned gate, as in DeepSeek-V4's first layers."""

    reads = Router.reads | {"hash_seed"}
    differentiable = True
    scored = True


def task_of(context: RoutingContext) -> torch.Tensor:
    """Returns the task (T,) of each token.

    Raises:
        ValueError: if the batch names no task.
    """
    if context.task_ids is None:
        raise ValueError("this router chooses by task: pass task_ids, one for each sequence of the batch.")
    return context.task_ids


class TaskRouter(TopKRouter):
    """Routes whole sequences by task: the gate reads a learned embedding of the task instead of the token.

    With task-level routing (Kudugunta et al., arXiv:2110.03742) all tokens of a task share K experts, which
    [`~modeling_moe.resizing.extract_task`] can extract as a model.
    """

    reads = (Router.reads | SELECTION_READS | {"num_tasks"}) - LOGIT_READS
    required_input = "task_ids"

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.task_embedding = nn.Parameter(torch.empty(config.num_tasks, config.hidden_size))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.task_embedding)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        task = task_of(context)
        # the product comes before the lookup, so that a token's logits are the same in every batch; it multiplies copies,
        # because the last bit of a small product depends on the operands' alignment, which differs in a loaded checkpoint
        return fp32_linear(self.jittered(self.task_embedding.clone()), self.weight.clone(), self.bias)[task]


class MMoERouter(TopKRouter):
    """Routes by one gate per task over shared experts (MMoE, Ma et al., KDD 2018).

    The paper mixes all experts: `num_experts_per_tok=num_experts`. Fewer experts make the mixture sparse.
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
    """Sends every token to every expert, with one weight per expert for all tokens, the parameter `expert_weight` (E,).

    A model that was extracted for one task has this router.
    """

    reads = (CAPACITY_READS - {"capacity_priority"}) | {"routed_scaling_factor"}

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.register_parameter("weight", None)
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
