# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures the routers: what a layer returns beside its hidden states, and the model's totals of it.

# E experts, Z experts without weights, L routers of one kind
"""

from typing import Any, NamedTuple

import torch

from .router import Routing, RoutingContext, expert_load, masked_mean, num_real_tokens
from .router_balancing import CONTROLLERS, KindTotals, warn_if_forgotten
from .router_capacity import count_dropped
from .router_kinds import KINDS
from .router_losses import RouterLosses, TokenWeights, balance, balanced_tokens, router_losses


class RouterStatistics(NamedTuple):
    """The measurements of one router in one pass; padding is excluded.

    A layer returns them rather than storing them on a module, because only returned tensors keep their gradient under
    reentrant and under non-reentrant checkpointing.

    Attributes:
        losses: the router's losses.
        load: (E + Z,) tokens sent to each expert, before capacity.
        tokens: scalar, number of tokens, or of assignments over K where K varies
            ([`~modeling_moe.router_losses.balanced_tokens`]).
        probs: (E + Z,) mean probabilities of the weighted tokens; None unless the balance loss is global.
        controller: (n,) sums that the router's controller observes; None if no router of the kind has a controller.
        dropped: (2,) assignments that capacity dropped, and assignments before capacity; None without capacity.
    """

    losses: RouterLosses
    load: torch.Tensor
    tokens: torch.Tensor
    probs: torch.Tensor | None = None
    controller: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


# kind of routers -> statistics of its routers, from the first layer to the last
Statistics = dict[str, list[RouterStatistics]]


class ModelStatistics(NamedTuple):
    """The routers' part of a model's output, from the statistics of all routers.

    Attributes:
        router_loss: scalar, weighted sum of the router losses, each the mean over the routers of a kind, and then the sum over
            the kinds; None in evaluation, or if no loss has a coefficient. Routers without a gradient
            (`Router.differentiable`) add nothing but losses of their own.
        aux_loss: scalar without gradient, the load-balancing loss averaged over the routers of a kind, and then the sum over
            the kinds; None without routers.
        expert_load: (L, E + Z) tokens sent to each expert of the sparse feed-forward networks, before capacity; None without
            sparse layers.
        dropped_share: (L,) share of the assignments to these experts that capacity dropped; None without capacity.
        attention_expert_load: (L', E') tokens sent to each expert of routed attention, before capacity; None without it.
        depth_load: (L'', 1) tokens that each layer of `depth_layers` processed; None without such layers.
    """

    router_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None
    dropped_share: torch.Tensor | None = None
    attention_expert_load: torch.Tensor | None = None
    depth_load: torch.Tensor | None = None


def layer_statistics(
    block: Any, chosen: Routing, routing: Routing, context: RoutingContext, weights: TokenWeights
) -> RouterStatistics:
    """Measures a routed module, from its routing before capacity (`chosen`) and after capacity (`routing`)."""
    config, mask = block.routing_config, context.token_mask
    load, top_k = expert_load(chosen, mask), config.num_experts_per_tok if block.router.variable_k else None
    losses = router_losses(chosen, context, config, weights, top_k)
    if block.training:
        # in training only: where weights are offloaded, the router's buffers lie on another device in evaluation
        losses = losses._replace(auxiliary=block.router.auxiliary_loss(chosen, mask))
    controller = None
    if config.controller is not None:
        with torch.no_grad():
            if block.controller is not None and block.training:
                controller = block.controller.observe(block.router, chosen, mask)
            else:
                controller = chosen.logits.new_zeros(CONTROLLERS[config.controller].size(config))
    return RouterStatistics(
        losses=losses,
        load=load,
        tokens=balanced_tokens(load, num_real_tokens(chosen, mask), top_k),
        probs=masked_mean(chosen.probs, weights.weight) if config.router_aux_loss_scope == "global" else None,
        controller=controller,
        dropped=count_dropped(chosen, routing, mask) if config.has_capacity else None,
    )


class LayerOutput(NamedTuple):
    """What a decoder layer returns.

    Attributes:
        hidden_states: (B, S, H).
        carried: (T, N) what the layer's router passes on to the next sparse layer ([`~modeling_moe.router.Routing`]), or a
            dense layer has received; None from most routers.
        statistics: kind of routers -> measurements of the layer's routers of that kind; kinds without any may be missing.
    """

    hidden_states: torch.Tensor
    carried: torch.Tensor | None
    statistics: Statistics


def pack(output: LayerOutput, slots: dict[str, int]) -> tuple[torch.Tensor | None, ...]:
    """Returns a layer's output as one flat tuple, of one length for all layers.

    Reentrant checkpointing differentiates only the tensors of the outermost tuple that a layer returns.

    Args:
        output: what the layer returns.
        slots: the numbers of statistics in the tuple ([`~modeling_moe.router_kinds.slots`]).
    """
    packed: list[torch.Tensor | None] = [output.hidden_states, output.carried]
    for kind, number in slots.items():
        found = output.statistics.get(kind, [])
        for losses, *rest in found:  # a hook on the block may have made a plain tuple of it
            packed += [*losses, *rest]
        packed += [None] * (_PACKED * (number - len(found)))
    return tuple(packed)


def unpack(output: Any, slots: dict[str, int], carries: bool = False) -> LayerOutput:
    """Returns the output that [`pack`] has flattened.

    An output that is a single tensor has no statistics: a stage of a pipeline passes its input through the layers that it
    does not hold.

    Args:
        output: what the layer has returned.
        slots: the numbers of statistics in the tuple.
        carries: whether the routers pass something on from layer to layer.

    Raises:
        ValueError: for a layer that the stage of a pipeline does not hold, if `carries`: a pipeline sends the hidden states
            alone from stage to stage.
    """
    if isinstance(output, torch.Tensor):
        if carries:
            raise ValueError(
                "this router_type reads what the router of the layer before has passed on, which transformers does not send "
                "between the stages of a pipeline: set pp_size to 1."
            )
        return LayerOutput(output, None, {})
    hidden_states, carried, *values = output
    found: Statistics = {}
    for kind, number in slots.items():
        for _ in range(number):
            part, values = values[:_PACKED], values[_PACKED:]
            if any(value is not None for value in part):
                losses = RouterLosses(*part[:_LOSSES])
                found.setdefault(kind, []).append(RouterStatistics(losses, *part[_LOSSES:]))
    return LayerOutput(hidden_states, carried, found)


_LOSSES = len(RouterLosses._fields)
_PACKED = _LOSSES + len(RouterStatistics._fields) - 1


def model_statistics(decoder: Any, statistics: Statistics) -> ModelStatistics:
    """Combines the statistics of the routers of all layers, and in training adds them to the totals of the optimizer step.

    A pass without gradient adds nothing, for example that of a reference model which is this model without its adapter.
    """
    totals = decoder.router_totals
    counts = decoder.training and (torch.is_grad_enabled() or totals.counts_without_grad)
    if counts and statistics:
        warn_if_forgotten(decoder)
    found: dict[str, Any] = {}
    for kind, routers in statistics.items():
        load = _stacked([router.load for router in routers]).detach()  # (L, E + Z)
        losses, dropped = _reduce(decoder, kind, routers, load, counts)
        found[KINDS[kind].load] = load
        if kind == "mlp" and dropped is not None:
            found["dropped_share"] = dropped[:, 0] / dropped[:, 1].clamp(min=1)
        if decoder.training:
            learned = kind in decoder.learned_kinds
            loss = losses.weighted_sum(totals.kinds[kind].routing_config) if learned else losses.auxiliary
            found["router_loss"] = _sum(found.get("router_loss"), loss)
        if losses.balance is not None:
            found["aux_loss"] = _sum(found.get("aux_loss"), losses.balance.detach())
    return ModelStatistics(**found)


def _reduce(
    decoder: Any, kind: str, routers: list[RouterStatistics], load: torch.Tensor, counts: bool
) -> tuple[RouterLosses, torch.Tensor | None]:
    """Averages the losses of the routers of one kind, and adds their observations to the totals if the pass counts.

    Returns:
        The losses, and the dropped and made assignments (L, 2), None without capacity.
    """
    totals = decoder.router_totals.kinds[kind]
    losses = RouterLosses(*(_mean(values, load.device) for values in zip(*(x.losses for x in routers), strict=True)))
    if decoder.training and totals.load is not None:
        losses = losses._replace(balance=_global_balance(totals, routers, load, counts))
    dropped = None if routers[-1].dropped is None else _stacked([router.dropped for router in routers])
    if counts:
        totals.add(None if routers[-1].controller is None else _stacked([x.controller for x in routers]), dropped)
    return losses, dropped


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Adds two scalars, on the device of the second; None counts as nothing."""
    if one is None or other is None:
        return other if one is None else one
    return one.to(other.device) + other


def _global_balance(
    totals: KindTotals, routers: list[RouterStatistics], load: torch.Tensor, counts: bool
) -> torch.Tensor:
    """Returns the load-balancing loss of the optimizer step so far, averaged over the routers of one kind."""
    probs, step = _stacked([router.probs for router in routers]), totals.load_of_step
    if step is None:
        tokens = _stacked([router.tokens for router in routers])
        step = totals.load_so_far(load, tokens, keep=counts)
    config = totals.routing_config
    loss = balance(step.load.to(probs), step.tokens.to(probs), probs, config.num_experts)
    return loss.mean() / config.router_parts


def _stacked(values: list[Any]) -> torch.Tensor:
    """Stacks the tensors of all layers, on the device of the last layer."""
    return torch.stack([value.to(values[-1].device) for value in values])


def _mean(values: tuple[torch.Tensor | None, ...], device: torch.device) -> torch.Tensor | None:
    """Averages the scalars of all layers; layers without one count as 0, and None means that no layer has one."""
    known = [value.to(device) for value in values if value is not None]
    return torch.stack(known).sum() / len(values) if known else None
