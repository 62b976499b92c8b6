# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""More experts for a model that has some: the same function at first, and room for what later training brings.

# E experts, m times as many after growth, K experts per token, H hidden
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..checkpoints.lazy_tensor import LazyTensor, State
from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from ..utils.limits import refuse_vast_result
from ..utils.seeds import generator_for
from .usage import Usage


# routers that in evaluation take the K best of E independent rows
ROW_ROUTERS = ("topk", "gumbel_topk", "task")
# tensors of theirs with one entry for each expert
ROUTER_ROWS = ("weight", "bias", "e_score_correction_bias")
# selection bias that no score makes up for
UNSELECTABLE = -1e4

_EXPERT_NAME = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(?:(\d+)\.)?(.+)")
_ROUTER_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.(.+)")


@dataclass
class GrowthOptions:
    """How a sparse model gets more experts; see [`grow`]."""

    mode: str = field(
        default="clone",
        metadata={
            "help": "clone: copies of all experts, and as many times more per token; masked: new experts that no "
            "token is sent to until they are released"
        },
    )
    factor: int = field(default=2, metadata={"help": "how many times as many experts"})
    num_experts: int | None = field(default=None, metadata={"help": "experts of each layer, in the place of factor"})
    keep_top_k: bool = field(
        default=False, metadata={"help": "clone: leave num_experts_per_tok as it is; changes the function"}
    )
    noise: float = field(
        default=0.01,
        metadata={
            "help": "noise, in standard deviations of the weight tensor, that lets copies part in training; clone: on "
            "the output projections, with sum 0 over an expert's copies"
        },
    )
    router_noise: float = field(
        default=0.0,
        metadata={
            "help": "noise on the copies' router rows, in standard deviations of the router; changes the function of "
            "clones"
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the noise"})

    def inexactness(self) -> str:
        """Why the result will not compute the source's function; empty if it will."""
        if self.mode == "masked":
            return ""
        if self.keep_top_k:
            return "keep_top_k: copies take the places of a token's other experts"
        if self.router_noise:
            return "router_noise moves the copies' weights, and which experts near the K-th are chosen"
        return ""


def replace_experts(
    state: State,
    counts: tuple[int, int],
    expert: Callable[[int, int, str, list[LazyTensor]], LazyTensor],
    router: Callable[[int, str, LazyTensor], LazyTensor],
) -> State:
    """A checkpoint with other experts; all else is as it was.

    Args:
        state: names as on disk, fused or one tensor for each expert.
        counts: number of experts before and after.
        expert: from layer, new expert, name within the expert (`up_proj.weight`, `down_proj_bias`) and the tensors of
            all old experts of that name to the tensor of the new expert.
        router: from layer, name within the router and its tensor to the new one.
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
    """Raises UserError unless all sparse layers choose by one of `routers`."""
    if config.router_type not in routers or config.router_gradient == "sparsemixer" or config.num_hash_layers:
        raise UserError(
            f"{what} needs router_type {' or '.join(routers)} in all sparse layers, without num_hash_layers and "
            f"router_gradient='sparsemixer': this model has router_type={config.router_type!r}, "
            f"num_hash_layers={config.num_hash_layers} and router_gradient={config.router_gradient!r}"
        )


def _target(config: MoEConfig, options: GrowthOptions) -> int:
    """Number of experts to grow to.

    Raises:
        UserError: see [`grow`].
    """
    if options.mode not in _CHANGES:
        raise UserError(f"mode {options.mode!r} is unknown: it must be one of {', '.join(_CHANGES)}")
    for name in ("noise", "router_noise"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"{name} is {getattr(options, name)}: it must be 0 or positive")
    refuse_other_routers(config, "growth", ROW_ROUTERS)
    if config.num_null_experts or config.num_copy_experts:
        raise UserError("num_null_experts and num_copy_experts cannot grow: only a model without them can")
    if config.has_capacity:
        raise UserError("the experts' capacity would change with their number: unset the capacity fields to grow")
    target = config.num_experts * options.factor if options.num_experts is None else options.num_experts
    if target <= config.num_experts:
        raise UserError(
            f"{target} experts are no growth: factor or num_experts must exceed the {config.num_experts} there"
        )
    return target


def _clone_changes(config: MoEConfig, options: GrowthOptions, target: int) -> dict:
    """Fields of the configuration that clones change."""
    factor, rest = divmod(target, config.num_experts)
    if rest:
        raise UserError(f"num_experts is {target}: mode='clone' needs a multiple of the {config.num_experts} there")
    changes: dict = {}
    if config.n_group > 1:
        # groups are copied whole, so that each has the strength that it had
        changes = {"n_group": config.n_group * factor, "topk_group": config.topk_group * factor}
    if not options.keep_top_k:
        changes["num_experts_per_tok"] = config.num_experts_per_tok * factor
        changes["expected_experts_per_tok"] = config.expected_experts_per_tok * factor
        if config.scoring_func != "softmax" and not config.norm_topk_prob:
            changes["routed_scaling_factor"] = config.routed_scaling_factor / factor
    return changes


def _masked_changes(config: MoEConfig, options: GrowthOptions, target: int) -> dict:
    """Fields of the configuration that unselectable experts change."""
    if config.scoring_func == "softmax" and (not config.norm_topk_prob or config.router_selection_bias):
        raise UserError(
            "mode='masked' would enter new experts into the softmax, which moves the weights with "
            "norm_topk_prob=False and the choice with router_selection_bias=True: use mode='clone'"
        )
    if config.router_controller == "quantile":
        raise UserError(
            "router_controller='quantile' centres the selection biases, those of masked experts too: use mode='clone' "
            "or another controller"
        )
    size = config.num_experts // config.n_group
    if target % size and config.n_group > 1:
        raise UserError(f"num_experts is {target}: with n_group={config.n_group} it must be a multiple of {size}")
    groups = target // size if config.n_group > 1 else 1
    return {"router_selection_bias": True, "n_group": groups}


_CHANGES: dict[str, Callable[[MoEConfig, GrowthOptions, int], dict]] = {
    "clone": _clone_changes,
    "masked": _masked_changes,
}


def grow(
    state: State, config: MoEConfig, options: GrowthOptions, usage: Usage | None = None
) -> tuple[State, MoEConfig]:
    """Gives every sparse layer more experts. The old ones keep their ids 0 ... E - 1, their copies follow.

    `clone`: m copies of every expert, router row, selection bias and group, and m K experts per token. A token is sent
    to all m copies of the experts that it was sent to, each with 1 / m of the weight, so that the function is the same
    in evaluation, for softmax and other scores, renormalised or not (for others that are not, `routed_scaling_factor`
    is divided by m); but for tokens whose K-th and next score are equal. Copies that are equal get equal gradients and
    stay equal for ever: `noise` on their output projections, of sum 0 over an expert's copies, parts them and changes
    the function by rounding alone. `keep_top_k` is Expert Upcycling (arXiv:2604.19835), which draws its noise on the
    selection bias. Here `router_noise` is on the router's rows, where each copy wins some tokens; a constant in the
    bias starves one of them until a controller moves it, and asks for a buffer that other formats have not.

    `masked`: new experts, copies of the old ones with noise, get the selection bias -1e4, so that no token chooses
    them until [`release_experts`]. The function is the same for renormalised softmax and for other scores. Until the
    release a `router_controller` counts them as idle: it aims at too low a load for the others, and raises their
    biases by its rate at each step, which nothing comes of. Better set one afterwards.

    Args:
        state: checkpoint, names as on disk; nothing is read.
        config: of it.
        options: how to grow.
        usage: with `mode="masked"`, copy the experts with the highest load rather than all in turn.

    Returns:
        Checkpoint and configuration.

    Raises:
        UserError: for an option or a router with which the function would change unasked.
    """
    target = _target(config, options)
    changes = _CHANGES[options.mode](config, options, target)
    if usage is not None and options.mode == "clone":
        raise UserError("usage has no effect with mode='clone', which copies all experts: leave it out")
    if changes.get("router_selection_bias") and not config.router_selection_bias:
        bias = LazyTensor.of(torch.zeros(config.num_experts))
        sparse = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
        state = state | {f"model.layers.{i}.mlp.gate.e_score_correction_bias": bias for i in sparse}
    grown = MoEConfig(**(config.to_dict() | changes | {"num_experts": target}))
    refuse_vast_result(grown, next(iter(state.values())).dtype)
    growth = _Growth(config, options, target, usage)
    return replace_experts(state, (config.num_experts, target), growth.expert, growth.router), grown


def _shifted(weight: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """`weight + scale * std(weight) * N(0, 1)`; the opposite scale shifts the other way."""
    if scale == 0:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    noise = torch.randn(weight.shape, generator=generator)
    return (wide + scale * wide.std(correction=0) * noise).to(weight.dtype)


@dataclass(frozen=True)
class _Growth:
    """Makes the tensors of experts and routers, `target` experts from those of `config`."""

    config: MoEConfig
    options: GrowthOptions
    target: int
    usage: Usage | None
    origins: dict[int, list[int]] = field(default_factory=dict)

    def origin(self, layer: int) -> list[int]:
        """The old expert that each new one is, or is a copy of."""
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
        """A tensor of expert `new`."""
        before, noise = self.config.num_experts, self.options.noise
        source = self.origin(layer)[new]
        scale, path = 0.0, (layer, new, part)
        if self.options.mode == "masked":
            scale = noise if new >= before and not part.endswith("bias") else 0.0
        elif part.removesuffix(".weight") == "down_proj":
            # from 1 to -1 over the copies, times the same noise
            scale, path = noise * (1 - 2 * (new // before) / (self.target // before - 1)), (layer, source, part)
        if scale == 0:
            return old[source]
        return old[source].map(lambda weight: _shifted(weight, scale, generator_for(self.options.seed, *path)))

    def router(self, layer: int, part: str, tensor: LazyTensor) -> LazyTensor:
        """A tensor of the router, in which the old experts come first."""
        if part not in ROUTER_ROWS:
            return tensor
        extend = {"weight": self.with_rows, "bias": self.with_copies, "e_score_correction_bias": self.with_bias}[part]
        return tensor.map(lambda old: extend(layer, old), shape=(self.target, *tensor.shape[1:]))

    def with_copies(self, layer: int, old: torch.Tensor) -> torch.Tensor:
        """`old` (E, ...) and the copies' entries."""
        return old[self.origin(layer)]

    def with_rows(self, layer: int, old: torch.Tensor) -> torch.Tensor:
        """As `with_copies`, with the router's noise on the copies."""
        copies = self.with_copies(layer, old)[len(old) :]
        generator = generator_for(self.options.seed, layer, "router")
        return torch.cat([old, _shifted(copies, self.options.router_noise, generator)])

    def with_bias(self, layer: int, old: torch.Tensor) -> torch.Tensor:
        """The selection bias."""
        if self.options.mode == "masked":
            return torch.cat([old, old.new_full((self.target - len(old),), UNSELECTABLE)])
        copies = self.with_copies(layer, old)
        # copies share the probability of a softmax, to which the bias is added
        return copies * (len(old) / self.target) if self.config.scoring_func == "softmax" else copies


@torch.no_grad()
def release_experts(model: nn.Module, experts: Iterable[int]) -> None:
    """Lets tokens choose experts that `mode="masked"` of [`grow`] has hidden.

    Their selection bias becomes the mean of those of the experts that can be chosen: 0 where nothing has moved them.

    Args:
        model: any model that holds routers of this package, wrapped or not.
        experts: ids.

    Raises:
        UserError: if a router has no selection bias, or no such expert.
    """
    experts = list(experts)
    biases: list[Any] = [m.e_score_correction_bias for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    if not biases or any(bias is None for bias in biases):
        raise UserError("the model has no experts to release: its routers need router_selection_bias=True")
    for bias in biases:
        if not experts or not 0 <= min(experts) <= max(experts) < len(bias):
            raise UserError(f"experts {experts} cannot be released: name some from 0 to {len(bias) - 1}")
        bias[experts] = bias[bias > UNSELECTABLE / 2].mean()
