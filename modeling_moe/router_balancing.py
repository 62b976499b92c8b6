# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Balancing without gradient: controllers that move the routers' buffers once per optimizer step.

A controller measures each forward pass in training, in sums that add up over micro-batches and ranks, and is stepped by
[`update_routers`] with their total. What is recomputed for checkpointing is not counted again.

# T tokens, E experts, Z experts without weights, K experts per token, L layers
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import logging

from .configuration_fields import COEFFICIENT, PROBABILITY, Condition, Range, setting
from .router import Router, Routing, expert_load


_BIAS = Condition(lambda config: config.router_selection_bias, "set router_selection_bias=True")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class BalancingFields:
    """Balancing without gradient."""

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
        "The decay of the moving averages of router_controller='quantile' and of router_type='expert_threshold'.",
        PROBABILITY,
        effect="training",
        conditions=(
            Condition(
                lambda config: config.controller in ("quantile", "threshold"),
                "set router_controller='quantile' or router_type='expert_threshold'",
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
    """What moves a buffer of the routers. Subclasses measure and step; the state is the routers' own."""

    def size(self, num_outputs: int) -> int:
        """Length n of what is measured, for E + Z outputs."""
        return num_outputs

    def measure(self, router: Router, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Sums (n,) over the tokens that count."""
        return expert_load(routing, token_mask)

    def step(self, routers: list[Router], totals: torch.Tensor) -> None:
        """Moves the routers of all layers by their totals (L, n)."""
        for router, total in zip(routers, totals, strict=True):
            self.step_layer(router, total)

    def step_layer(self, router: Router, total: torch.Tensor) -> None:
        """Moves one router by its total (n,)."""
        raise NotImplementedError


class BiasController(Controller):
    """`b_i += rate * sign(mean(load) - load_i)`: auxiliary-loss-free balancing (arXiv:2408.15664, algorithm 1)."""

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        # in place: the router may be wrapped, and hand on what is read alone
        router.e_score_correction_bias.add_(torch.sign(total.mean() - total), alpha=router.bias_update_rate)


class ProportionalController(Controller):
    """`b_i += rate * (K_e / (K E) - load_i / (K T))` for experts with weights, so that a token uses
    `expected_experts_per_tok` (K_e) of them on average (LongCat-Flash, arXiv:2509.01322)."""

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        real = router.num_experts
        target = router.expected_experts / (router.top_k * real)
        error = target - total[:real] / total.sum().clamp(min=1)
        router.e_score_correction_bias[:real].add_(error, alpha=router.bias_update_rate)


def column_quantile(values: torch.Tensor, share: float, token_mask: torch.Tensor | None) -> torch.Tensor:
    """What `share` of the tokens that count exceed or reach, for each column, times their number; then that number.

    Args:
        values: (T, N).
        share: from 0 to 1.
        token_mask: (T,).

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
    """`b` follows minus the score by which an expert has to exceed the others' threshold to get K / E of the tokens.

    Quantile balancing as in Megatron-LM: with alpha_t the K-th largest of `score + b` of a token, beta_i is what K / E of
    the tokens exceed in `score_i - alpha`; `b = ema(b, -beta)` with `router_ema_decay`, re-centred to mean 0. beta is the
    mean of the micro-batches' quantiles, weighted by their tokens.
    """

    def size(self, num_outputs: int) -> int:
        return num_outputs + 1

    def measure(self, router: Any, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        scores, _ = router.score(routing.logits)
        alpha = (scores + router.e_score_correction_bias).topk(router.top_k, dim=-1).values[:, -1:]
        return column_quantile(scores - alpha, router.top_k / router.num_outputs, token_mask)

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        if total[-1] > 0:
            bias = router.e_score_correction_bias
            bias.lerp_(-total[:-1] / total[-1], 1 - router.ema_decay)
            bias.sub_(bias.mean())


class ThresholdController(Controller):
    """`threshold` follows the score that K / E of the tokens reach, by a moving average with `router_ema_decay` that begins
    with the first measurement (Expert Threshold, arXiv:2603.11535).

    The measurement is the mean of the micro-batches' quantiles, weighted by their tokens.
    """

    def size(self, num_outputs: int) -> int:
        return num_outputs + 1

    def measure(self, router: Any, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        scores, _ = router.score(routing.logits)
        return column_quantile(scores, router.top_k / router.num_experts, token_mask)

    def step_layer(self, router: Any, total: torch.Tensor) -> None:
        if total[-1] > 0:
            decay = router.ema_decay if router.threshold_steps > 0 else 0.0
            router.threshold.lerp_(total[:-1] / total[-1], 1 - decay)
            router.threshold_steps.add_(1)


class SparsityController(Controller):
    """Multiplies `sparsity_coef` by `router_sparsity_step` if tokens use more than K experts, averaged over the layers,
    and divides it by that if they use fewer (ReMoE, arXiv:2412.14711)."""

    def size(self, num_outputs: int) -> int:
        return 2

    def measure(self, router: Router, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        tokens = routing.logits.new_tensor(len(routing.index)) if token_mask is None else (token_mask > 0).sum()
        return torch.stack([expert_load(routing, token_mask).sum(), tokens.to(routing.logits.dtype)])

    def step(self, routers: list[Any], totals: torch.Tensor) -> None:
        used = (totals[:, 0] / totals[:, 1].clamp(min=1)).mean()
        for router in routers:
            factor = router.sparsity_step ** (torch.sign(used - router.top_k) * totals[:, 1].any())
            router.sparsity_coef.mul_(factor.to(router.sparsity_coef.device))


# router_controller, or a router's own -> controller
CONTROLLERS: dict[str, Controller] = {
    "bias": BiasController(),
    "proportional": ProportionalController(),
    "quantile": QuantileController(),
    "threshold": ThresholdController(),
    "sparsity": SparsityController(),
}


def _decoders(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "router_totals")]


def all_ranks(total: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


@torch.no_grad()
def update_routers(model: nn.Module) -> None:
    """Steps the routers' controllers and begins a new optimizer step: call it once after each `optimizer.step()`.

    [`~modeling_moe.training.MoECallback`] does so in a `Trainer`. Sums what was measured over all ranks, so all must call
    it. A second call before the next forward pass does nothing. A warning comes once for each model if more than 10 % of
    the assignments of a step were dropped for want of capacity. A model that has no such thing is left alone.

    Every pass in training since the last call counts. A loop that abandons a step (no `optimizer.step()`, because the
    loss was NaN for example) calls [`forget_counts`] in its place.

    Args:
        model: any model that holds a [`MoEModel`], wrapped or not.
    """
    for decoder in _decoders(model):
        totals = decoder.router_totals
        if totals.statistics is not None and totals.statistics.numel():
            controlled = [i for i, block in enumerate(decoder.sparse_blocks()) if block.controller is not None]
            routers = [decoder.sparse_blocks()[i].router for i in controlled]
            statistics = all_ranks(totals.statistics)[controlled]
            if statistics.any():
                decoder.sparse_blocks()[controlled[0]].controller.step(routers, statistics)
        if totals.dropped is not None:
            dropped, assigned = all_ranks(totals.dropped).tolist()
            if dropped > 0.1 * assigned:
                totals.warn_once(
                    "dropped",
                    f"{dropped / assigned:.0%} of the experts' assignments were dropped: raise the capacity, or balance "
                    "the load (router_aux_loss_coef, router_controller).",
                )
        totals.reset()
        totals.watching = False


def forget_counts(model: nn.Module) -> None:
    """Drops what the routers' controllers have measured, so that the passes of an abandoned step move nothing.

    [`~modeling_moe.training.MoECallback`] does so at the beginning of each step of a `Trainer`.

    Args:
        model: any model that holds a [`MoEModel`], wrapped or not.
    """
    for decoder in _decoders(model):
        decoder.router_totals.reset()


FORGOTTEN = (
    "the model trains, and nobody has called update_routers: selection biases, thresholds and the like do not move, "
    "and a load that is balanced globally adds up over all steps. Call model.update_routers() after each optimizer.step(), "
    "or give a Trainer the callback modeling_moe.training.MoECallback()."
)


def warn_if_forgotten(decoder: Any) -> None:
    """Warns, once for each model, of an optimizer step that no [`update_routers`] followed: to be called in each pass.

    An optimizer's step is told by the counters of what was written to the trained parameters, which the accumulation of
    gradients leaves alone. Nobody looks any more after the first [`update_routers`], and inside a compiled graph.
    """
    totals = decoder.router_totals
    # in this order: a compiled graph would be made anew when the flag falls
    if torch.compiler.is_compiling() or not totals.watching:
        return
    if totals.stepped(decoder):
        totals.warn_once("forgotten", FORGOTTEN)
        totals.watching = False
    totals.writes = writes_of(decoder)


def writes_of(decoder: nn.Module) -> dict[int, int]:
    """How often each trained parameter, told by its `id`, has been written to."""
    return {id(parameter): parameter._version for parameter in decoder.parameters() if parameter.requires_grad}


def warn_of_unused(model: nn.Module) -> None:
    """Warns, once for each model, if controllers have measured a step and never moved: to be called when a model is saved.

    Where all passes were compiled nobody has looked for a step, and what was measured is taken for one.
    """
    for decoder in _decoders(model):
        totals = decoder.router_totals
        counted = [x for x in (totals.statistics, totals.load) if x is not None and not x.is_meta and bool(x.any())]
        if totals.watching and counted and (totals.writes is None or totals.stepped(decoder)):
            totals.warn_once("forgotten", FORGOTTEN)


class RouterTotals(nn.Module):
    """What the sparse layers have measured since the last optimizer step; buffers that no checkpoint holds.

    Attributes:
        statistics: (L, n) of the controllers; None without one.
        load: (L, E + Z), tokens that each expert received on all ranks; None unless the balance loss is global.
        dropped: (2,), assignments dropped and made; None without capacity.
        load_of_step: (L, E + Z), the load of the whole optimizer step, where it is known beforehand; see
            [`exact_global_balance`].
        counting: whether a pass without gradient counts too.
        watching: whether an optimizer step without [`update_routers`] would matter, and none of them is known yet.
        writes: [`writes_of`] the decoder in the last pass; None before the first.
    """

    def __init__(self, layers: int, statistics: int, load: int, drops: bool):
        super().__init__()
        new = {"statistics": (layers, statistics), "load": (layers, load), "dropped": (2,)}
        wanted = {"statistics": statistics > 0, "load": load > 0, "dropped": drops}
        for name, shape in new.items():
            if wanted[name]:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32), persistent=False)
            else:
                setattr(self, name, None)  # accelerate takes a registered None for a tensor to move
        self.load_of_step = None
        self.counting = False
        self.watching = statistics > 0 or load > 0
        self.writes: dict[int, int] | None = None
        self.told: set[str] = set()

    def _load_from_state_dict(self, *args, **kwargs):
        if self.writes is not None:
            self.writes = {}  # what a state dict writes to the parameters is no step
        super()._load_from_state_dict(*args, **kwargs)

    def stepped(self, decoder: nn.Module) -> bool:
        """Whether a parameter that was trained in the last pass, and is now, has been written to since."""
        before = self.writes or {}
        return any(before.get(key, count) != count for key, count in writes_of(decoder).items())

    def warn_once(self, kind: str, message: str) -> None:
        """Warns, unless a message of this kind, however it was worded, has come before."""
        if kind not in self.told:
            self.told.add(kind)
            logger.warning(message)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets all to 0."""
        for buffer in self.buffers():
            buffer.zero_()


@contextmanager
def exact_global_balance(model: nn.Module, batches: Iterable[dict]):
    """Makes the gradients of the balance loss of scope `"global"` add up over micro-batches to the whole batch's, exactly.

    The shares f of the whole optimizer step have to be known before the first backward. Outside, a micro-batch knows its
    own and earlier ones; this runs all of them once without gradient to count (a router with noise draws other noise
    then). Enter it at the beginning of a step, on all ranks; in a `Trainer`, where `get_batch_samples` returns the step's
    micro-batches.

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
        decoder.router_totals.counting = True
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for decoder in decoders:
            totals = decoder.router_totals
            totals.counting = False
            totals.load_of_step = None if totals.load is None else totals.load.clone()
            totals.reset()
        yield
    finally:
        for decoder in decoders:
            decoder.router_totals.counting = False
            decoder.router_totals.load_of_step = None
