# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module balances the experts' load without gradient: controllers move the routers' buffers once per optimizer step.

A controller observes each forward pass in training, as sums that add up over micro-batches and ranks. [`update_routers`]
steps the controllers with the totals. A layer that checkpointing recomputes is not observed again.

# T tokens, E experts, Z experts without weights, K choices per token, L sparse layers
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from .configuration_fields import COEFFICIENT, HAS_DEPTH, PROBABILITY, Condition, Range, setting
from .router import Routing, expert_load


_BIAS = Condition(lambda config: config.router_selection_bias, "set router_selection_bias=True")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class BalancingFields:
    """These fields configure the controllers that balance experts without gradient."""

    router_controller: Literal["bias", "proportional", "quantile"] | None = setting(
        None,
        'The rule that moves the selection bias once per optimizer step: "bias" by the sign of the imbalance (DeepSeek-V3), '
        '"proportional" in proportion to it (LongCat-Flash), "quantile" to the value at which it would vanish (Megatron-LM).',
        effect="training",
        conditions=(_BIAS,),
        follows="bias if router_bias_update_rate is positive, else None",
    )
    router_bias_update_rate: float | int = setting(
        0.0,
        'The step size of the router controllers "bias" and "proportional"; a positive rate without router_controller chooses '
        '"bias".',
        COEFFICIENT,
        effect="training",
        conditions=(
            _BIAS,
            Condition(
                lambda config: config.router_controller in ("bias", "proportional"),
                "set router_controller='bias' or 'proportional'",
            ),
        ),
    )
    router_ema_decay: float | int = setting(
        0.99,
        "The decay of the moving averages of router_controller='quantile', of router_type='expert_threshold', of depth_layers and "
        "of the centroids of routed_attention='routing_transformer', whose paper uses 0.999.",
        PROBABILITY,
        effect="training",
        conditions=(
            Condition(
                lambda config: (
                    config.controller in ("quantile", "threshold")
                    or config.routed_attention == "routing_transformer"
                    or (HAS_DEPTH.holds(config) and config.depth_router == "expert_threshold")
                ),
                "set router_controller='quantile', router_type='expert_threshold', routed_attention='routing_transformer' or "
                "depth_layers",
            ),
        ),
    )
    expected_experts_per_tok: float | int = setting(
        None,
        "The average number of experts with weights per token that router_controller='proportional' aims at.",
        Range(0, 2**17, open_below=True),
        effect="training",
        conditions=(
            Condition(
                lambda config: config.router_controller == "proportional", "set router_controller='proportional'"
            ),
        ),
        follows="num_experts_per_tok",
    )


logger = logging.get_logger(__name__)


class Controller:
    """Base class of controllers, which move a buffer of the routers; a controller keeps no state, the routers do."""

    def size(self, config: Any) -> int:
        """Returns the number n of sums that the controller observes, by the configuration as the routers read it."""
        return config.num_router_outputs

    def observe(self, router: Any, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns sums (n,) over the tokens, padding excluded."""
        return expert_load(routing, token_mask)

    def step(self, routers: list[Any], totals: torch.Tensor) -> None:
        """Moves the routers of all layers by their totals (L, n)."""
        for router, total in zip(routers, totals, strict=True):
            self.step_layer(router, total)

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        """Moves one router by its total (n,)."""
        raise NotImplementedError


class BiasController(Controller):
    """Moves the selection bias by the sign of the imbalance: auxiliary-loss-free balancing (arXiv:2408.15664, algorithm 1).

    `b_i += rate * sign(mean(load) - load_i)`, with rate `router_bias_update_rate`.
    """

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        """Moves one router by its load (E + Z,)."""
        # in place: PEFT may wrap the router, and a wrapper passes on reads but not assignments
        router.e_score_correction_bias.add_(torch.sign(total.mean() - total), alpha=router.bias_update_rate)


class ProportionalController(Controller):
    """Moves the selection bias of experts with weights in proportion to the imbalance (LongCat-Flash, arXiv:2509.01322).

    `b_i += rate * (K_e / (K E) - load_i / (K T))`, so that a token uses K_e (`expected_experts_per_tok`) experts with
    weights on average.
    """

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        """Moves one router by its load (E + Z,)."""
        real = router.num_experts
        target = router.expected_experts / (router.top_k * real)
        error = target - total[:real] / total.sum().clamp(min=1)
        router.e_score_correction_bias[:real].add_(error, alpha=router.bias_update_rate)


def column_quantile(values: torch.Tensor, share: float, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns, for each column, the value that `share` of the tokens reach, times the number of tokens; then that number.

    The product with the number of tokens lets micro-batches be summed.

    Args:
        values: (T, N).
        share: from 0 to 1.
        token_mask: (T,) 0 at padding, which is excluded; None without padding.

    Returns:
        (N + 1,).
    """
    count = values.new_tensor(len(values)) if token_mask is None else (token_mask > 0).sum().to(values.dtype)
    if token_mask is not None:
        values = values.masked_fill((token_mask == 0)[:, None], float("-inf"))
    place = ((count * share).round().long() - 1).clamp(min=0, max=len(values) - 1)
    quantile = values.sort(dim=0, descending=True).values.index_select(0, place[None])[0]
    return torch.cat([torch.where(count > 0, quantile * count, 0.0), count[None]])


class QuantileController(Controller):
    """Moves the selection bias to where each expert would get K / E of the tokens: Megatron-LM's quantile balancing.

    With alpha_t the K-th largest `score + b` of token t (`logit + b` for `router_selection_bias_on="logits"`), beta_i is the
    value that K / E of the tokens reach in `score_i - alpha`. The bias follows -beta by a moving average with
    `router_ema_decay`, and is shifted to mean 0. beta is the mean of the micro-batches' quantiles, weighted by their tokens.
    """

    def size(self, config: Any) -> int:
        """Returns the number of quantiles, and one for the number of tokens."""
        return config.num_router_outputs + 1

    def observe(self, router: Any, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns the quantiles beta times the number of tokens, then that number: (E + Z + 1,)."""
        scores = router.ranking(router.score(routing.logits)[0], routing.logits)
        alpha = (scores + router.e_score_correction_bias).topk(router.top_k, dim=-1).values[:, -1:]
        return column_quantile(scores - alpha, router.top_k / router.num_outputs, token_mask)

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        """Moves one router by its summed quantiles (E + Z + 1,)."""
        if total[-1] > 0:
            bias = router.e_score_correction_bias
            bias.lerp_(-total[:-1] / total[-1], 1 - router.ema_decay)
            bias.sub_(bias.mean())


class ThresholdController(Controller):
    """Moves `threshold` to the score that K / E of the tokens reach (Expert Threshold, arXiv:2603.11535).

    The threshold follows by a moving average with `router_ema_decay`, which begins with the first observation. An
    observation is the mean of the micro-batches' quantiles, weighted by their tokens.
    """

    def size(self, config: Any) -> int:
        """Returns the number of quantiles, and one for the number of tokens."""
        return config.num_router_outputs + 1

    def observe(self, router: Any, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns the quantiles times the number of tokens, then that number: (E + 1,)."""
        scores, _ = router.score(routing.logits)
        return column_quantile(scores, router.top_k / router.num_experts, token_mask)

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        """Moves one router by its summed quantiles (E + 1,)."""
        if total[-1] > 0:
            decay = router.ema_decay if router.threshold_steps > 0 else 0.0
            router.threshold.lerp_(total[:-1] / total[-1], 1 - decay)
            router.threshold_steps.add_(1)


class SparsityController(Controller):
    """Moves `sparsity_coef` so that tokens use K experts on average over the layers (ReMoE, arXiv:2412.14711).

    The coefficient is multiplied by `router_sparsity_step` if tokens use more experts, and divided by it if they use fewer.
    """

    def size(self, config: Any) -> int:
        """Returns 2: the number of assignments and the number of tokens."""
        return 2

    def observe(self, router: Any, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns the number of assignments and the number of tokens: (2,)."""
        tokens = routing.logits.new_tensor(len(routing.index)) if token_mask is None else (token_mask > 0).sum()
        return torch.stack([expert_load(routing, token_mask).sum(), tokens.to(routing.logits.dtype)])

    def step(self, routers: list[Any], totals: torch.Tensor) -> None:
        """Moves the routers of all layers by one factor."""
        used = (totals[:, 0] / totals[:, 1].clamp(min=1)).mean()
        for router in routers:
            factor = router.sparsity_step ** (torch.sign(used - router.top_k) * totals[:, 1].any())
            router.sparsity_coef.mul_(factor.to(router.sparsity_coef.device))


class CentroidController(Controller):
    """Moves the `centroids` of clusters towards the mean direction of what the clusters hold (Routing Transformer).

    A centroid follows the normalised sum of its routing vectors by a moving average with `router_ema_decay`, and is
    normalised again: spherical k-means. The paper (arXiv:2003.05997) adds the sums themselves, whose size would grow
    with the batch, and uses 0.999. A centroid without vectors stays where it is.
    """

    def size(self, config: Any) -> int:
        """Returns the number G * C * D of features of all centroids of a layer."""
        return config.num_key_value_heads * config.attention_experts * config.head_dim

    def observe(self, router: Any, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns the sums of the routing vectors in each cluster: (G * C * D,)."""
        return router.cluster_sums(routing, token_mask).flatten()

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        """Moves the centroids of one router by the summed routing vectors (G * C * D,)."""
        centroids = router.centroids
        sums = total.view_as(centroids).to(centroids)
        moved = centroids.lerp(nn.functional.normalize(sums, dim=-1), 1 - router.ema_decay)
        used = sums.any(dim=-1, keepdim=True)
        centroids.copy_(torch.where(used, nn.functional.normalize(moved, dim=-1), centroids))


# router_controller, or a router's default_controller -> controller
CONTROLLERS: dict[str, Controller] = {
    "bias": BiasController(),
    "proportional": ProportionalController(),
    "quantile": QuantileController(),
    "threshold": ThresholdController(),
    "sparsity": SparsityController(),
    "centroids": CentroidController(),
}


def _decoders(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "router_totals")]


def all_ranks(total: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


@torch.no_grad()
def update_routers(model: nn.Module) -> None:
    """Steps the routers' controllers and begins a new optimizer step: call it once after each `optimizer.step()`.

    [`~modeling_moe.training.MoECallback`] calls it in a `Trainer`. It sums the observations of all ranks, so all ranks must
    call it. A second call before the next forward pass does nothing, and a model without controllers stays as it is. One
    warning per model says that capacity dropped more than 10 % of a step's assignments.

    Every training pass since the last call counts. A loop that abandons a step without `optimizer.step()`, for example
    because the loss was NaN, calls [`forget_counts`] instead.

    Args:
        model: any model that holds a [`MoEModel`], wrapped or not.
    """
    for decoder in _decoders(model):
        totals = decoder.router_totals
        for kind, of_kind in totals.kinds.items():
            _step_controllers(decoder.routed_modules(kind), of_kind)
            if of_kind.dropped is not None:
                dropped, assigned = all_ranks(of_kind.dropped).tolist()
                if dropped > 0.1 * assigned:
                    totals.warn_once(
                        "dropped",
                        f"{dropped / assigned:.0%} of the experts' assignments were dropped: raise the capacity, or "
                        "balance the load (router_aux_loss_coef, router_controller).",
                    )
        totals.reset()
        totals.awaits_update = False


def _step_controllers(modules: list[Any], totals: "KindTotals") -> None:
    """Steps the controllers of the routed modules of one kind with the observations of all ranks."""
    if totals.statistics is None or not totals.statistics.numel():
        return
    controlled = [i for i, module in enumerate(modules) if module.controller is not None]
    statistics = all_ranks(totals.statistics)[controlled]
    if statistics.any():
        modules[controlled[0]].controller.step([modules[i].router for i in controlled], statistics)


def forget_counts(model: nn.Module) -> None:
    """Sets the observations of the routers' controllers to 0, so that the passes of an abandoned step move nothing.

    [`~modeling_moe.training.MoECallback`] calls it at the beginning of each step of a `Trainer`.

    Args:
        model: any model that holds a [`MoEModel`], wrapped or not.
    """
    for decoder in _decoders(model):
        decoder.router_totals.reset()


FORGOTTEN = (
    "the model trains without update_routers: selection biases, thresholds and the like do not move, and the load of a "
    "global balance loss adds up over all steps. Call model.update_routers() after each optimizer.step(), or give a Trainer "
    "the callback modeling_moe.training.MoECallback()."
)


def warn_if_forgotten(decoder: Any) -> None:
    """Warns once per model if an optimizer stepped and [`update_routers`] was not called; the model calls this in each pass.

    An optimizer step is noticed by the trained parameters, which gradient accumulation does not change. The check ends
    with the first [`update_routers`], and does not take place inside a compiled graph or while a CUDA graph is captured.
    """
    totals = decoder.router_totals
    # in this order: a compiled graph would be compiled again when the flag changes
    if torch.compiler.is_compiling() or not totals.awaits_update or _captures():
        return
    if totals.stepped(decoder):
        totals.warn_once("forgotten", FORGOTTEN)
        totals.awaits_update = False
    totals.versions = parameter_versions(decoder)


@contextmanager
def writes_without_step(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Tells [`warn_if_forgotten`] that what the block writes to parameters is no optimizer step."""
    decoders = [decoder for decoder in _decoders(model) if decoder.router_totals.versions is not None]
    for decoder in decoders:
        warn_if_forgotten(decoder)  # of a step before the block
    try:
        yield
    finally:
        for decoder in decoders:
            versions = decoder.router_totals.versions
            versions.update({id(x): _version(x) for x in parameters if id(x) in versions})


def _captures() -> bool:
    """Says whether a CUDA graph is captured, in which no value can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class ParameterVersion(NamedTuple):
    """What an optimizer step changes of a parameter.

    Attributes:
        writes: how often operators have written to the parameter, which torch's fused optimizers do not count.
        value: the first number (1,) of the part that this process holds, (0,) without a part, or None if it cannot be read.
    """

    writes: int
    value: torch.Tensor | None

    def differs(self, other: "ParameterVersion") -> bool:
        """Says whether one of the two was written to after the other."""
        mine, others = self.value, other.value
        if self.writes != other.writes or mine is None or others is None:
            return self.writes != other.writes
        # a cast is no step, nor is the gathering of a parameter whose part here was empty
        if (mine.shape, mine.dtype, mine.device) != (others.shape, others.dtype, others.device):
            return False
        return not torch.equal(mine, others)


def parameter_versions(decoder: nn.Module) -> dict[int, ParameterVersion]:
    """Returns the version of each trained parameter by the `id` of the parameter."""
    return {id(parameter): _version(parameter) for parameter in decoder.parameters() if parameter.requires_grad}


def _version(parameter: nn.Parameter) -> ParameterVersion:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    value = local.detach().reshape(-1)[:1].clone()
    # a fake tensor, which tools use to trace a model, is of another type
    readable = type(value) is torch.Tensor and not value.is_meta
    return ParameterVersion(parameter._version, value if readable else None)


def warn_of_unused(model: nn.Module) -> None:
    """Warns once per model if controllers have observed a step and never moved; saving a model calls this.

    If all passes were compiled nothing has looked for a step, and the observations are taken for one.
    """
    for decoder in _decoders(model):
        totals = decoder.router_totals
        observed = [x for of_kind in totals.kinds.values() for x in (of_kind.statistics, of_kind.load)]
        counted = [x for x in observed if x is not None and not x.is_meta and bool(x.any())]
        if totals.awaits_update and counted and (totals.versions is None or totals.stepped(decoder)):
            totals.warn_once("forgotten", FORGOTTEN)


class StepLoad(NamedTuple):
    """The load of an optimizer step, or of its micro-batches so far, over all ranks.

    Attributes:
        load: (L, E + Z) tokens sent to each expert.
        tokens: (L,) number of tokens.
    """

    load: torch.Tensor
    tokens: torch.Tensor


class KindTotals(nn.Module):
    """The statistics of the routers of one kind since the last optimizer step, as buffers that no checkpoint holds.

    Args:
        config: the configuration as the routers read it.
        routers: number L of routers.

    Attributes:
        routing_config: the configuration as the routers read it.
        statistics: (L, n) observations of the controllers; None without controllers.
        load: (L, E + Z) tokens sent to each expert on all ranks; None unless the balance loss is global.
        tokens: (L,) tokens on all ranks; None unless the balance loss is global.
        dropped: (2,) assignments dropped by capacity, and assignments made; None without capacity.
        load_of_step: load of the whole optimizer step where it is known beforehand ([`exact_global_balance`]), or None.
    """

    statistics: torch.Tensor | None
    load: torch.Tensor | None
    tokens: torch.Tensor | None
    dropped: torch.Tensor | None

    def __init__(self, config: Any, routers: int):
        super().__init__()
        self.routing_config = config
        controller = None if config.controller is None else CONTROLLERS[config.controller]
        outputs, is_global = config.num_router_outputs, config.router_aux_loss_scope == "global"
        shapes: dict[str, tuple[int, ...] | None] = {
            "statistics": None if controller is None else (routers, controller.size(config)),
            "load": (routers, outputs) if is_global else None,
            "tokens": (routers,) if is_global else None,
            "dropped": (2,) if config.has_capacity else None,
        }
        for name, shape in shapes.items():
            if shape is None:
                setattr(self, name, None)  # accelerate takes a registered None for a tensor to move
            else:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32), persistent=False)
        self.load_of_step: StepLoad | None = None

    def add(self, statistics: torch.Tensor | None, dropped: torch.Tensor | None) -> None:
        """Adds the controllers' observations (L, n) and the routers' dropped and made assignments (L, 2) of one pass."""
        if self.statistics is not None and statistics is not None:
            self.statistics += statistics.detach().to(self.statistics)
        if self.dropped is not None and dropped is not None:
            self.dropped += dropped.sum(dim=0).to(self.dropped)

    def load_so_far(self, load: torch.Tensor, tokens: torch.Tensor, keep: bool) -> StepLoad:
        """Returns the load of the optimizer step so far, a pass with load (L, E + Z) and tokens (L,) included.

        Args:
            load: tokens sent to each expert on this rank.
            tokens: tokens on this rank.
            keep: whether the pass counts for later passes of the step.
        """
        assert self.load is not None
        assert self.tokens is not None
        both = all_ranks(torch.cat([load, tokens[:, None]], dim=-1).to(self.load))
        step = StepLoad(self.load + both[:, :-1], self.tokens + both[:, -1])
        if keep:
            self.load.copy_(step.load)
            self.tokens.copy_(step.tokens)
        return step


class RouterTotals(nn.Module):
    """The statistics of a decoder's routers since the last optimizer step, and what is known of the optimizer's steps.

    Args:
        kinds: kind of routers -> the configuration as they read it, and their number.

    Attributes:
        kinds: kind of routers -> [`KindTotals`].
        counts_without_grad: whether a pass without gradient counts too.
        awaits_update: whether the model needs [`update_routers`] and nothing has called it yet.
        versions: [`parameter_versions`] of the decoder in the last pass; None before the first pass.
    """

    kinds: Any

    def __init__(self, kinds: dict[str, tuple[Any, int]]):
        super().__init__()
        self.kinds = nn.ModuleDict({kind: KindTotals(config, number) for kind, (config, number) in kinds.items()})
        self.counts_without_grad = False
        self.awaits_update = any(x.statistics is not None or x.load is not None for x in self.kinds.values())
        self.versions: dict[int, ParameterVersion] | None = None
        self.warned: set[str] = set()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.versions is not None:
            self.versions = {}  # loading a state dict writes to the parameters, and is not an optimizer step
        super()._load_from_state_dict(*args, **kwargs)

    def stepped(self, decoder: nn.Module) -> bool:
        """Says whether a parameter that was trained in the last pass, and still is, has been written to since."""
        before = self.versions or {}
        now = parameter_versions(decoder)
        return any(now[key].differs(before[key]) for key in now.keys() & before.keys())

    def warn_once(self, kind: str, message: str) -> None:
        """Logs a warning, unless the model has logged one of the same kind, whatever its words."""
        if kind not in self.warned:
            self.warned.add(kind)
            logger.warning(message)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets all buffers to 0."""
        for buffer in self.buffers():
            buffer.zero_()


@contextmanager
def exact_global_balance(model: nn.Module, batches: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Makes the gradients of a global balance loss add up, over micro-batches, to those of the whole batch exactly.

    The load of the whole optimizer step has to be known before the first backward. By default a micro-batch knows its own
    load and that of earlier ones; this context first runs all micro-batches without gradient to count, in which a router
    with noise draws other noise. Enter it at the beginning of a step, on all ranks; in a `Trainer`, in
    `get_batch_samples`, which returns the step's micro-batches.

    Args:
        model: in training mode.
        batches: keyword arguments of `model` for each micro-batch of the step.

    Example:
        >>> with exact_global_balance(model, micro_batches):
        ...     for batch in micro_batches:
        ...         model(**batch, num_items_in_batch=labels).loss.backward()
        >>> optimizer.step()
        >>> update_routers(model)
    """
    decoders = _decoders(model)
    for decoder in decoders:
        decoder.router_totals.counts_without_grad = True
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for decoder in decoders:
            totals = decoder.router_totals
            totals.counts_without_grad = False
            for of_kind in totals.kinds.values():
                if of_kind.load is not None:
                    of_kind.load_of_step = StepLoad(of_kind.load.clone(), of_kind.tokens.clone())
            totals.reset()
        yield
    finally:
        for decoder in decoders:
            decoder.router_totals.counts_without_grad = False
            for of_kind in decoder.router_totals.kinds.values():
                of_kind.load_of_step = None
