# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives a sparse model more experts without changing its function.

# E experts, m times as many after growth, K experts per token, H hidden
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ..checkpoints import LazyTensor, State
from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from ..utils.limits import refuse_vast_result
from ..utils.seeds import generator_for
from .usage import Usage


# routers that choose, in evaluation, the K largest of E independent logits
ROW_ROUTERS = ("topk", "gumbel_topk", "task")
# tensors of these routers with one entry for each expert
ROUTER_ROWS = ("weight", "bias", "e_score_correction_bias", "expert_scale")
# selection bias of an expert that no token chooses
UNSELECTABLE = -1e4

_EXPERT_NAME = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(?:(\d+)\.)?(.+)")
_ROUTER_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.(.+)")

Changes = dict[str, int | float | bool]
"""Maps fields of a configuration to their new values."""

MakeExpert = Callable[[int, int, str, list[LazyTensor]], LazyTensor]
"""Makes a tensor of a new expert from the layer, the id of the new expert, the tensor's name within the expert
(`up_proj.weight`, `down_proj_bias`) and the tensors of that name of all old experts."""

MakeRouter = Callable[[int, str, LazyTensor], LazyTensor]
"""Makes a tensor of a new router from the layer, the tensor's name within the router and the old tensor."""


@dataclass
class GrowthOptions:
    """These options say how a sparse model gets more experts; see [`grow`]."""

    mode: Literal["clone", "masked"] = field(
        default="clone",
        metadata={
            "help": "clone: copy all experts and multiply num_experts_per_tok by the same factor; masked: add experts that "
            "no token is sent to until they are released"
        },
    )
    factor: int = field(default=2, metadata={"help": "factor by which the number of experts grows"})
    num_experts: int | None = field(
        default=None, metadata={"help": "number of experts of each layer; replaces factor"}
    )
    keep_top_k: bool = field(
        default=False, metadata={"help": "clone: do not change num_experts_per_tok; changes the function"}
    )
    noise: float = field(
        default=0.01,
        metadata={
            "help": "standard deviation of noise, relative to that of the weight tensor, that lets copies diverge in "
            "training; mode clone adds it to the down projections, with the sum 0 over an expert's copies"
        },
    )
    router_noise: float = field(
        default=0.0,
        metadata={
            "help": "standard deviation of noise on the copies' router rows, relative to that of the router; changes the "
            "function of clones"
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the noise"})

    def reason_not_exact(self) -> str | None:
        """Returns why the result will not compute the source's function, or None if it will."""
        if self.mode == "masked":
            return None
        if self.keep_top_k:
            return "keep_top_k: copies displace other experts of a token"
        if self.router_noise:
            return "router_noise changes the routing weights of copies, and which experts near the K-th are chosen"
        return None


def replace_experts(
    state: State,
    counts: tuple[int, int],
    expert: MakeExpert,
    router: MakeRouter,
) -> State:
    """Returns a checkpoint with other experts and routers, and all other tensors unchanged.

    Args:
        state: checkpoint with its names on disk; experts are fused or have one tensor each.
        counts: number of experts before and after.
        expert: makes a tensor of a new expert.
        router: makes a tensor of a new router.
    """
    before, after = counts
    result: State = {}
    for name, tensor in state.items():
        if match := _ROUTER_NAME.fullmatch(name):
            result[name] = router(int(match[1]), match[2], tensor)
        elif match := _EXPERT_NAME.fullmatch(name):
            prefix, layer, index, part = match[1], int(match[2]), match[3], match[4]
            if index is None:
                old = [tensor[i] for i in range(before)]
                result[name] = LazyTensor.stack([expert(layer, i, part, old) for i in range(after)])
            elif int(index) == 0:
                old = [state[f"{prefix}{i}.{part}"] for i in range(before)]
                result |= {f"{prefix}{i}.{part}": expert(layer, i, part, old) for i in range(after)}
        else:
            result[name] = tensor
    return result


def refuse_other_routers(config: MoEConfig, what: str, routers: tuple[str, ...]) -> None:
    """Raises UserError unless all sparse layers have one of `routers`; `what` names the operation in the message."""
    if config.router_type not in routers or config.router_gradient == "sparsemixer" or config.num_hash_layers:
        raise UserError(
            f"{what} needs router_type {' or '.join(routers)} in all sparse layers, without num_hash_layers and "
            f"router_gradient='sparsemixer': this model has router_type={config.router_type!r}, "
            f"num_hash_layers={config.num_hash_layers} and router_gradient={config.router_gradient!r}"
        )


def _target(config: MoEConfig, options: GrowthOptions) -> int:
    """Returns the number of experts after growth.

    Raises:
        UserError: if an option or the router is refused, see [`grow`].
    """
    if options.mode not in _CHANGES:
        raise UserError(f"mode {options.mode!r} is unknown: it must be one of {', '.join(_CHANGES)}")
    for name in ("noise", "router_noise"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"{name} is {getattr(options, name)}: it must be 0 or positive")
    refuse_other_routers(config, "growth", ROW_ROUTERS)
    if config.num_null_experts or config.num_copy_experts:
        raise UserError("num_null_experts and num_copy_experts must be 0 to grow: grow a model without them")
    if config.has_capacity:
        raise UserError(
            "the capacity of an expert would change with the number of experts: unset the capacity fields to grow"
        )
    target = config.num_experts * options.factor if options.num_experts is None else options.num_experts
    if target <= config.num_experts:
        raise UserError(
            f"growth to {target} experts is impossible: the model has {config.num_experts}; raise factor or num_experts"
        )
    return target


def _clone_changes(config: MoEConfig, options: GrowthOptions, target: int) -> Changes:
    """Returns the fields of the configuration that cloning changes, with their new values."""
    factor, rest = divmod(target, config.num_experts)
    if rest:
        raise UserError(f"num_experts is {target}: mode='clone' needs a multiple of the model's {config.num_experts}")
    changes: Changes = {}
    if config.n_group > 1:
        # whole groups are copied, so that the score of each group is unchanged
        changes = {"n_group": config.n_group * factor, "topk_group": config.topk_group * factor}
    if not options.keep_top_k:
        changes["num_experts_per_tok"] = config.num_experts_per_tok * factor
        if config.expected_experts_per_tok != config.num_experts_per_tok:
            changes["expected_experts_per_tok"] = config.expected_experts_per_tok * factor
        if config.scoring_func != "softmax" and not config.norm_topk_prob:
            changes["routed_scaling_factor"] = config.routed_scaling_factor / factor
    return changes


def _masked_changes(config: MoEConfig, options: GrowthOptions, target: int) -> Changes:
    """Returns the fields of the configuration that masked experts change, with their new values."""
    if config.scoring_func == "softmax" and (not config.norm_topk_prob or config.router_selection_bias):
        raise UserError(
            "mode='masked' would add new experts to the softmax, which changes the routing weights with "
            "norm_topk_prob=False and the choice with router_selection_bias=True: use mode='clone'"
        )
    if config.router_controller == "quantile":
        raise UserError(
            "router_controller='quantile' centres the selection biases, including those of masked experts: use "
            "mode='clone' or another controller"
        )
    size = config.num_experts // config.n_group
    if target % size and config.n_group > 1:
        raise UserError(f"num_experts is {target}: with n_group={config.n_group} it must be a multiple of {size}")
    groups = target // size if config.n_group > 1 else 1
    return {"router_selection_bias": True, "n_group": groups}


# mode -> function that returns the changed fields of the configuration
_CHANGES: dict[str, Callable[[MoEConfig, GrowthOptions, int], Changes]] = {
    "clone": _clone_changes,
    "masked": _masked_changes,
}


def grow(
    state: State, config: MoEConfig, options: GrowthOptions, usage: Usage | None = None
) -> tuple[State, MoEConfig]:
    """Gives every sparse layer more experts. The old experts keep their ids 0 ... E - 1, and their copies follow.

    `clone` makes m copies of every expert, router row, selection bias and group, and routes a token to m K experts. A
    token is sent to all m copies of the experts that it was sent to, each with 1 / m of the routing weight, so that
    the function is unchanged in evaluation, for softmax and other scores, renormalised or not (`routed_scaling_factor`
    is divided by m for other scores that are not renormalised). Exceptions are tokens whose K-th and next score are
    equal. Equal copies get equal gradients and would remain equal for ever: `noise` on their down projections, with
    the sum 0 over an expert's copies, separates them and changes the function by rounding alone. `keep_top_k` is
    Expert Upcycling (arXiv:2604.19835), which draws noise on the selection bias. Here `router_noise` is on the
    router's rows, where each copy wins some tokens; a constant in the bias would starve one copy until a controller
    corrects it, and would need a buffer that other formats do not have.

    `masked` adds copies of the old experts, with noise and the selection bias -1e4, so that no token chooses them
    until [`release_experts`]. The function is unchanged for renormalised softmax and for other scores. Until the
    release a `router_controller` counts the new experts as idle: it aims at too low a load for the old experts, and
    raises the biases of the new ones at each step without effect. Set a controller after the release.

    Args:
        state: checkpoint with its names on disk; no weight is read.
        config: configuration of the checkpoint.
        options: how to grow.
        usage: with `mode="masked"`, copies the experts with the highest load; without it, all experts in turn.

    Returns:
        Checkpoint and configuration.

    Raises:
        UserError: if an option is out of range, or the function would change with this router.
    """
    target = _target(config, options)
    changes = _CHANGES[options.mode](config, options, target)
    if usage is not None and options.mode == "clone":
        raise UserError("usage has no effect with mode='clone', which copies all experts: omit it")
    if changes.get("router_selection_bias") and not config.router_selection_bias:
        bias = LazyTensor.of(torch.zeros(config.num_experts))
        sparse = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
        state = state | {f"model.layers.{i}.mlp.gate.e_score_correction_bias": bias for i in sparse}
    grown = config.replace(**changes, num_experts=target)
    refuse_vast_result(grown, next(iter(state.values())).dtype)
    growth = _Growth(config, options, target, usage)
    return replace_experts(state, (config.num_experts, target), growth.expert, growth.router), grown


def _shifted(weight: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Returns `weight + scale * std(weight) * N(0, 1)`; the negative scale subtracts the same noise."""
    if scale == 0:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    noise = torch.randn(weight.shape, generator=generator)
    return (wide + scale * wide.std(correction=0) * noise).to(weight.dtype)


@dataclass(frozen=True)
class _Growth:
    """Makes the tensors of `target` experts and their routers from those of a model with `config`."""

    config: MoEConfig
    options: GrowthOptions
    target: int
    usage: Usage | None
    origins: dict[int, list[int]] = field(default_factory=dict)

    def origin(self, layer: int) -> list[int]:
        """Returns for each new expert the id of the old expert that it is, or that it copies."""
        if layer not in self.origins:
            self.origins[layer] = self._origin(layer)
        return self.origins[layer]

    def _origin(self, layer: int) -> list[int]:
        before = self.config.num_experts
        if self.usage is None:
            return [i % before for i in range(self.target)]
        busiest = self.usage.of(layer).load.argsort(descending=True, stable=True).tolist()
        return [*range(before), *(busiest[i % before] for i in range(self.target - before))]

    def expert(self, layer: int, new: int, part: str, old: list[LazyTensor]) -> LazyTensor:
        """Returns a tensor of expert `new`."""
        before, noise = self.config.num_experts, self.options.noise
        source = self.origin(layer)[new]
        scale, path = 0.0, (layer, new, part)
        if self.options.mode == "masked":
            scale = noise if new >= before and not part.endswith("bias") else 0.0
        elif part.removesuffix(".weight") == "down_proj":
            # the copies of an expert share one noise tensor, with factors from 1 to -1
            scale, path = noise * (1 - 2 * (new // before) / (self.target // before - 1)), (layer, source, part)
        if scale == 0:
            return old[source]
        return old[source].map(lambda weight: _shifted(weight, scale, generator_for(self.options.seed, *path)))

    def router(self, layer: int, part: str, tensor: LazyTensor) -> LazyTensor:
        """Returns a tensor of the router; the rows of the old experts come first."""
        if part not in ROUTER_ROWS:
            return tensor
        extend = {"weight": self.with_rows, "e_score_correction_bias": self.with_bias}.get(part, self.with_copies)
        return tensor.map(lambda old: extend(layer, old), shape=(self.target, *tensor.shape[1:]))

    def with_copies(self, layer: int, old: torch.Tensor) -> torch.Tensor:
        """Returns the entries of the old experts `old` (E, ...), followed by those of the copies."""
        return old[self.origin(layer)]

    def with_rows(self, layer: int, old: torch.Tensor) -> torch.Tensor:
        """Returns the router rows of the old experts, followed by those of the copies with `router_noise`."""
        copies = self.with_copies(layer, old)[len(old) :]
        generator = generator_for(self.options.seed, layer, "router")
        return torch.cat([old, _shifted(copies, self.options.router_noise, generator)])

    def with_bias(self, layer: int, old: torch.Tensor) -> torch.Tensor:
        """Returns the selection bias of all experts."""
        if self.options.mode == "masked":
            return torch.cat([old, old.new_full((self.target - len(old),), UNSELECTABLE)])
        copies = self.with_copies(layer, old)
        shared = self.config.scoring_func == "softmax" and self.config.router_selection_bias_on == "scores"
        # the bias is added to softmax probabilities, which the copies of an expert share
        return copies * (len(old) / self.target) if shared else copies


@torch.no_grad()
def release_experts(model: nn.Module, experts: Iterable[int]) -> None:
    """Lets tokens choose experts that [`grow`] added with `mode="masked"`.

    Their selection bias becomes the mean bias of the experts that can be chosen, which is 0 if no controller ran.

    Args:
        model: any module that contains routers of this package.
        experts: expert ids.

    Raises:
        UserError: if a router has no selection bias, or there is no such expert.
    """
    experts = list(experts)
    modules = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
    biases = [b for module in modules if isinstance(b := module.e_score_correction_bias, torch.Tensor)]
    if not biases or len(biases) < len(modules):
        raise UserError("the model has no experts to release: its routers need router_selection_bias=True")
    for bias in biases:
        if not experts or not 0 <= min(experts) <= max(experts) < len(bias):
            raise UserError(f"experts {experts} cannot be released: give ids from 0 to {len(bias) - 1}")
        bias[experts] = bias[bias > UNSELECTABLE / 2].mean()
