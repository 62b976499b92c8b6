# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reduces the number of experts: those that a text uses least are dropped, or merged into the others.

# E experts, K experts per token, G groups
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..checkpoints import LazyTensor, State
from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from .growth import ROUTER_ROWS, MakeExpert, refuse_other_routers, replace_experts
from .usage import SCORES, Usage


# why no pruned model computes the whole model's function
PRUNED = "tokens of a dropped expert are sent to other experts"


@dataclass
class PruningOptions:
    """These options say which experts are kept; see [`prune`] and [`merge`]."""

    keep: int = field(default=4, metadata={"help": "number of experts that each layer keeps"})
    score: Literal["reap", "load", "mass"] = field(
        default="reap",
        metadata={
            "help": "score by which experts are ranked: reap (routing weight times norm of the output, averaged over the "
            "expert's tokens), load (tokens) or mass (routing weight)"
        },
    )

    def reason_not_exact(self, config: MoEConfig) -> str:
        """Returns why the result will not compute the function of a model with `config`."""
        reason = PRUNED
        if config.scoring_func == "softmax" and not config.norm_topk_prob:
            reason += (
                "; norm_topk_prob=False: the softmax runs without the dropped experts, so that all other weights rise"
            )
        biased = config.router_selection_bias and config.router_selection_bias_on == "scores"
        if config.scoring_func == "softmax" and biased:
            reason += "; the softmax runs without the dropped experts, so that the selection bias has less influence"
        return reason


def check_pruning(config: MoEConfig, options: PruningOptions) -> None:
    """Refuses options that cannot be applied to a model, before anything is measured.

    Raises:
        UserError: if an option is out of range, or the router cannot lose experts; the message names it.
    """
    refuse_other_routers(config, "pruning (for task see extract_task)", ("topk", "gumbel_topk"))
    if options.score not in SCORES:
        raise UserError(f"score {options.score!r} is unknown: it must be one of {', '.join(SCORES)}")
    if not 1 <= options.keep < config.num_experts or options.keep % config.n_group:
        raise UserError(
            f"keep is {options.keep}: it must be a multiple of n_group ({config.n_group}) from 1 to "
            f"{config.num_experts - 1} (num_experts - 1)"
        )


def kept_experts(config: MoEConfig, usage: Usage, options: PruningOptions) -> dict[int, list[int]]:
    """Returns the kept expert ids of each sparse layer, ascending: equally many of each group, those with the best
    scores.

    Args:
        config: configuration of the model.
        usage: usage of the model's experts.
        options: how many experts are kept, and by what score.

    Raises:
        UserError: if the options cannot be applied to the model, or the usage is of another model.
    """
    check_pruning(config, options)
    kept = {}
    for layer, kind in enumerate(config.mlp_layer_types):
        if kind == "sparse":
            scores = SCORES[options.score](usage.of(layer))
            refuse_other_usage(scores, layer, config.num_experts)
            kept[layer] = best_experts(scores, options.keep, config.n_group)
    return kept


def refuse_other_usage(scores: torch.Tensor, layer: int, num_experts: int) -> None:
    """Raises UserError unless the usage of a layer has the model's number of experts."""
    if len(scores) != num_experts:
        raise UserError(
            f"the usage has {len(scores)} experts in layer {layer} and the model has {num_experts}: measure it with the "
            "same model"
        )


def best_experts(scores: torch.Tensor, keep: int, groups: int = 1) -> list[int]:
    """Returns the ids of the `keep` experts with the highest scores, ascending; equally many of each group.

    Args:
        scores: (E,), in which a group is a range of E / G consecutive experts.
        keep: number of ids, a multiple of `groups`.
        groups: number G of groups.
    """
    order = scores.view(groups, -1).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(0, len(scores), len(scores) // groups)[:, None]
    return (order[:, : keep // groups] + first).flatten().sort().values.tolist()


def prune(state: State, config: MoEConfig, usage: Usage, options: PruningOptions) -> tuple[State, MoEConfig]:
    """Drops all but the best experts of each layer, with their rows in the router.

    With the usage of one domain's text the result is a sub-model for that domain. On a text that uses no dropped
    expert the logits are unchanged, except for the effects on the softmax that [`PruningOptions.reason_not_exact`]
    names. `score="reap"` ranks experts as in REAP (arXiv:2510.13999), where dropping was better than merging for
    generation.

    Args:
        state: checkpoint with its names on disk; no weight is read.
        config: configuration of the checkpoint.
        usage: usage of the checkpoint's experts, see [`~modeling_moe.resizing.usage.measure_usage`].
        options: how many experts are kept, and by what score.

    Returns:
        Checkpoint and configuration; `num_experts_per_tok` is lowered to the number of experts that a token can
            choose.

    Raises:
        UserError: if the options cannot be applied to the model, or the usage is of another model.
    """
    kept = kept_experts(config, usage, options)

    def expert(layer: int, new: int, part: str, old: list[LazyTensor]) -> LazyTensor:
        return old[kept[layer][new]]

    return _with_experts(state, config, kept, expert)


def merge(state: State, config: MoEConfig, usage: Usage, options: PruningOptions) -> tuple[State, MoEConfig]:
    """Merges the experts that [`prune`] would drop into those that it would keep.

    A dropped expert is merged into the kept expert of its group whose router row has the highest cosine with its own.
    A kept expert becomes the mean of itself and the experts merged into it, weighted by load and computed in fp32, with the
    learned factor on its output (`router_expert_scale`); its router row, by which it is chosen, is unchanged. Neurons are
    averaged in their order: experts that began as copies of one dense network are aligned; other experts may have permuted
    their neurons, and should be pruned.

    Arguments, results and errors are those of [`prune`]. Only the router's weights are read.
    """
    kept = kept_experts(config, usage, options)
    clusters = {layer: _clusters(state, config, layer, experts) for layer, experts in kept.items()}

    def shares(layer: int, new: int) -> list[float]:
        load = usage.of(layer).load[clusters[layer][new]]
        # if no member was used, the kept expert, which is the first, is unchanged
        load[0].clamp_(min=1e-20)
        return (load / load.sum()).tolist()

    def expert(layer: int, new: int, part: str, old: list[LazyTensor]) -> LazyTensor:
        members = clusters[layer][new]
        if len(members) == 1:
            return old[members[0]]
        return LazyTensor.combine(lambda *tensors: _mean(tensors, shares(layer, new)), *(old[i] for i in members))

    def scale(layer: int, old: torch.Tensor) -> torch.Tensor:
        means = [_mean(old[members], shares(layer, new)) for new, members in enumerate(clusters[layer])]
        return torch.cat([torch.stack(means).to(old.dtype), old[config.num_experts :]])

    return _with_experts(state, config, kept, expert, scale)


def _mean(tensors: Sequence[torch.Tensor] | torch.Tensor, shares: list[float]) -> torch.Tensor:
    """Returns the sum of the tensors, weighted by `shares`, in fp32 or wider."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=dtype)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(dtype), alpha=share)
    return total


def _clusters(state: State, config: MoEConfig, layer: int, kept: list[int]) -> list[list[int]]:
    """Returns, for each kept expert, the ids of the experts that are merged into it, its own id first."""
    rows = state[f"model.layers.{layer}.mlp.gate.weight"].read()[: config.num_experts]
    rows = torch.nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    group = torch.arange(config.num_experts) // (config.num_experts // config.n_group)
    near = (rows @ rows[kept].T).masked_fill(group[:, None] != group[kept], float("-inf")).argmax(dim=-1).tolist()
    clusters = [[expert] for expert in kept]
    for expert, place in enumerate(near):
        if expert not in kept:
            clusters[place].append(expert)
    return clusters


def _with_experts(
    state: State,
    config: MoEConfig,
    kept: dict[int, list[int]],
    expert: MakeExpert,
    scale: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[State, MoEConfig]:
    """Returns the checkpoint with new experts and the kept experts' router rows, and its configuration.

    `scale` makes the factors on the new experts' outputs from a layer's index and factors; without it the kept are taken.
    """
    count = len(next(iter(kept.values())))
    idle = list(range(config.num_experts, config.num_router_outputs))

    def router(layer: int, part: str, tensor: LazyTensor) -> LazyTensor:
        if part not in ROUTER_ROWS:
            return tensor
        rows = kept[layer] + idle
        if part == "expert_scale" and scale is not None:
            return tensor.map(lambda old: scale(layer, old), shape=(len(rows),))
        return tensor.map(lambda old: old[rows], shape=(len(rows), *tensor.shape[1:]))

    eligible = config.topk_group * (count // config.n_group) + len(idle)
    top_k = min(config.num_experts_per_tok, eligible)
    changes = {
        "num_experts": count,
        "num_experts_per_tok": top_k,
        "expected_experts_per_tok": min(config.expected_experts_per_tok, top_k),
    }
    result = replace_experts(state, (config.num_experts, count), expert, router)
    return result, config.replace(**changes)
