# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Fewer experts: those that a text uses least are dropped, or merged into those that stay.

# E experts, K experts per token, G groups
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoints.lazy_tensor import LazyTensor, State
from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from .growth import ROUTER_ROWS, refuse_other_routers, replace_experts
from .usage import SCORES, Usage


@dataclass
class PruningOptions:
    """Which experts stay; see [`prune`] and [`merge`]."""

    keep: int = field(default=4, metadata={"help": "experts that each layer keeps"})
    score: str = field(
        default="reap",
        metadata={
            "help": "what the best experts have most of: reap (weight times norm of the output, mean over their "
            "tokens), load (tokens) or mass (weight)"
        },
    )

    def inexactness(self, config: MoEConfig) -> str:
        """Why the result will not compute the function of a model with `config`."""
        reason = "tokens that used a dropped expert use others"
        if config.scoring_func == "softmax" and not config.norm_topk_prob:
            reason += "; norm_topk_prob=False: the dropped experts leave the softmax, so that all other weights rise"
        if config.scoring_func == "softmax" and config.router_selection_bias:
            reason += "; the dropped experts leave the softmax, so that the selection bias weighs less"
        return reason


def check_pruning(config: MoEConfig, options: PruningOptions) -> None:
    """Refuses options that leave no model, before anything is measured.

    Raises:
        UserError: names the option, or the router that cannot lose experts.
    """
    refuse_other_routers(config, "pruning (for task see extract_task)", ("topk", "gumbel_topk"))
    if options.score not in SCORES:
        raise UserError(f"score {options.score!r} is unknown: it must be one of {', '.join(SCORES)}")
    if not 1 <= options.keep < config.num_experts or options.keep % config.n_group:
        raise UserError(
            f"keep is {options.keep}: it must be a multiple of n_group ({config.n_group}) from 1 to "
            f"{config.num_experts - 1}, one less than num_experts"
        )


def kept_experts(config: MoEConfig, usage: Usage, options: PruningOptions) -> dict[int, list[int]]:
    """Experts of each sparse layer that stay, in order: the best of each group, as many of each.

    Args:
        config: of the model.
        usage: of its experts.
        options: how many stay, and by what score.

    Raises:
        UserError: for an option or a router that leaves no model.
    """
    check_pruning(config, options)
    kept = {}
    for layer, kind in enumerate(config.mlp_layer_types):
        if kind == "sparse":
            scores = SCORES[options.score](usage.of(layer))
            if len(scores) != config.num_experts:
                raise UserError(
                    f"the usage has {len(scores)} experts in layer {layer} and num_experts is {config.num_experts}: "
                    "measure it with the same model"
                )
            order = scores.view(config.n_group, -1).argsort(dim=-1, descending=True, stable=True)
            best = order[:, : options.keep // config.n_group]
            first = torch.arange(0, config.num_experts, config.num_experts // config.n_group)[:, None]
            kept[layer] = (best + first).flatten().sort().values.tolist()
    return kept


def prune(state: State, config: MoEConfig, usage: Usage, options: PruningOptions) -> tuple[State, MoEConfig]:
    """Drops all but the best experts of each layer, and their rows of the router.

    With the usage of one domain's text the result is a sub-model for that domain. On a text on which no dropped expert
    was ever used its logits are the same, but for what [`PruningOptions.inexactness`] says of softmax. `score="reap"`
    ranks as REAP does (arXiv:2510.13999), which found dropping better than merging for generation.

    Args:
        state: checkpoint, names as on disk; nothing is read.
        config: of it.
        usage: of its experts, see [`~modeling_moe.resizing.usage.measure_usage`].
        options: how many stay, and by what score.

    Returns:
        Checkpoint and configuration; `num_experts_per_tok` is lowered to what a token can still choose.

    Raises:
        UserError: for an option, a router or a usage that does not fit.
    """
    kept = kept_experts(config, usage, options)

    def expert(layer: int, new: int, part: str, old: list[LazyTensor]) -> LazyTensor:
        return old[kept[layer][new]]

    return _with_experts(state, config, kept, expert)


def merge(state: State, config: MoEConfig, usage: Usage, options: PruningOptions) -> tuple[State, MoEConfig]:
    """Merges the experts that [`prune`] would drop into those that it would keep.

    Each goes to the kept expert of its group whose router row has the highest cosine with its own. One that stays
    becomes the mean of itself and all that came to it, weighted by load and computed in fp32; its router row stays.
    Neurons are averaged in the order in which they lie: experts that began as copies of one dense network are aligned,
    others may have permuted their neurons, and should be pruned.

    Args, returns and raises: as [`prune`]. The router's weights, and nothing else, are read at once.
    """
    kept = kept_experts(config, usage, options)
    clusters = {layer: _clusters(state, config, layer, experts) for layer, experts in kept.items()}

    def expert(layer: int, new: int, part: str, old: list[LazyTensor]) -> LazyTensor:
        members = clusters[layer][new]
        if len(members) == 1:
            return old[members[0]]
        load = usage.of(layer).load[members]
        # where none was used the first, which is the kept one, stays as it is
        load[0].clamp_(min=1e-20)
        shares = (load / load.sum()).tolist()
        return LazyTensor.combine(lambda *tensors: _mean(tensors, shares), *(old[i] for i in members))

    return _with_experts(state, config, kept, expert)


def _mean(tensors: tuple[torch.Tensor, ...], shares: list[float]) -> torch.Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=dtype)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(dtype), alpha=share)
    return total


def _clusters(state: State, config: MoEConfig, layer: int, kept: list[int]) -> list[list[int]]:
    """Experts that make up each kept one, itself first."""
    rows = state[f"model.layers.{layer}.mlp.gate.weight"].read()[: config.num_experts]
    rows = torch.nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    group = torch.arange(config.num_experts) // (config.num_experts // config.n_group)
    near = (rows @ rows[kept].T).masked_fill(group[:, None] != group[kept], float("-inf")).argmax(dim=-1).tolist()
    clusters = [[expert] for expert in kept]
    for expert, place in enumerate(near):
        if expert not in kept:
            clusters[place].append(expert)
    return clusters


def _with_experts(state: State, config: MoEConfig, kept: dict[int, list[int]], expert) -> tuple[State, MoEConfig]:
    """The checkpoint with new experts and the kept ones' router rows, and its configuration."""
    count = len(next(iter(kept.values())))
    idle = list(range(config.num_experts, config.num_router_outputs))

    def router(layer: int, part: str, tensor: LazyTensor) -> LazyTensor:
        if part not in ROUTER_ROWS:
            return tensor
        rows = kept[layer] + idle
        return tensor.map(lambda old: old[rows], shape=(len(rows), *tensor.shape[1:]))

    eligible = config.topk_group * (count // config.n_group) + len(idle)
    top_k = min(config.num_experts_per_tok, eligible)
    expected: Any = config.expected_experts_per_tok
    changes = {
        "num_experts": count,
        "num_experts_per_tok": top_k,
        "expected_experts_per_tok": min(expected, top_k),
    }
    result = replace_experts(state, (config.num_experts, count), expert, router)
    return result, MoEConfig(**(config.to_dict() | changes))
