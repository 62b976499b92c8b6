# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures the routers: what a sparse layer returns beside its hidden states, and the model's totals of it.

# E experts, Z experts without weights, L sparse layers
"""

from typing import Any, NamedTuple

import torch

from .router import Routing, RoutingContext, expert_load, masked_mean, num_real_tokens
from .router_balancing import CONTROLLERS, warn_if_forgotten
from .router_capacity import count_dropped
from .router_losses import RouterLosses, TokenWeights, balance, balanced_tokens, router_losses


class RouterStatistics(NamedTuple):
    """The measurements of one sparse layer in one pass; padding is excluded.

    A layer returns them rather than storing them on a module, because only returned tensors keep their gradient under
    reentrant and under non-reentrant checkpointing.

    Attributes:
        losses: the router's losses.
        load: (E + Z,) tokens sent to each expert, before capacity.
        tokens: scalar, number of tokens, or of assignments over K where K varies
            ([`~modeling_moe.router_losses.balanced_tokens`]).
        probs: (E + Z,) mean probabilities of the weighted tokens; None unless the balance loss is global.
        controller: (n,) sums that the layer's controller observes; None if no layer has a controller.
        dropped: (2,) assignments that capacity dropped, and assignments before capacity; None without capacity.
    """

    losses: RouterLosses
    load: torch.Tensor
    tokens: torch.Tensor
    probs: torch.Tensor | None = None
    controller: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


class ModelStatistics(NamedTuple):
    """The routers' part of a model's output, from the statistics of all sparse layers.

    Attributes:
        router_loss: scalar, weighted sum of the router losses, each the mean over the layers; None in evaluation, or if no
            loss has a coefficient.
        aux_loss: scalar without gradient, the load-balancing loss averaged over the layers; None without sparse layers.
        expert_load: (L, E + Z) tokens sent to each expert, before capacity; None without sparse layers.
        dropped_share: (L,) share of the assignments that capacity dropped; None without capacity.
    """

    router_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None
    dropped_share: torch.Tensor | None = None


def layer_statistics(
    block: Any, chosen: Routing, routing: Routing, context: RoutingContext, weights: TokenWeights
) -> RouterStatistics:
    """Measures a sparse block, from its routing before capacity (`chosen`) and after capacity (`routing`)."""
    config, mask = block.config, context.token_mask
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
                controller = chosen.logits.new_zeros(CONTROLLERS[config.controller].size(config.num_router_outputs))
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
        statistics: measurements of the layer's router; None from a dense layer, and where nothing is measured.
    """

    hidden_states: torch.Tensor
    carried: torch.Tensor | None = None
    statistics: RouterStatistics | None = None


def pack(output: LayerOutput) -> tuple[torch.Tensor | None, ...]:
    """Returns a layer's output as one flat tuple, of one length for all layers.

    Reentrant checkpointing differentiates only the tensors of the outermost tuple that a layer returns.
    """
    hidden_states, carried, statistics = output
    if statistics is None:
        return (hidden_states, carried, *[None] * _PACKED)
    losses, *rest = statistics  # a hook on the block may have made a plain tuple of it
    return (hidden_states, carried, *losses, *rest)


def unpack(output: Any, carries: bool = False) -> LayerOutput:
    """Returns the output that [`pack`] has flattened.

    An output that is a single tensor has no statistics: a stage of a pipeline passes its input through the layers that it
    does not hold.

    Args:
        output: what the layer has returned.
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
        return LayerOutput(output)
    hidden_states, carried, *values = output
    if all(value is None for value in values):
        return LayerOutput(hidden_states, carried)
    losses = len(RouterLosses._fields)
    return LayerOutput(hidden_states, carried, RouterStatistics(RouterLosses(*values[:losses]), *values[losses:]))


_PACKED = len(RouterLosses._fields) + len(RouterStatistics._fields) - 1


def model_statistics(decoder: Any, layers: list[RouterStatistics]) -> ModelStatistics:
    """Combines the statistics of the sparse layers, and in training adds them to the totals of the optimizer step.

    A pass without gradient adds nothing, for example that of a reference model which is this model without its adapter.
    """
    if not layers:
        return ModelStatistics()
    config, totals = decoder.config, decoder.router_totals
    counts = decoder.training and (torch.is_grad_enabled() or totals.counts_without_grad)
    if counts:
        warn_if_forgotten(decoder)
    load = _stacked([layer.load for layer in layers]).detach()  # (L, E + Z)
    losses = RouterLosses(*(_mean(values, load.device) for values in zip(*(x.losses for x in layers), strict=True)))
    if decoder.training and totals.load is not None:
        losses = losses._replace(balance=_global_balance(decoder, layers, load, counts))
    dropped = None if layers[-1].dropped is None else _stacked([layer.dropped for layer in layers])
    if counts:
        totals.add(None if layers[-1].controller is None else _stacked([x.controller for x in layers]), dropped)
    return ModelStatistics(
        router_loss=losses.weighted_sum(config) if decoder.training else None,
        aux_loss=None if losses.balance is None else losses.balance.detach(),
        expert_load=load,
        dropped_share=None if dropped is None else dropped[:, 0] / dropped[:, 1].clamp(min=1),
    )


def _global_balance(decoder: Any, layers: list[RouterStatistics], load: torch.Tensor, counts: bool) -> torch.Tensor:
    """Returns the load-balancing loss of the optimizer step so far, averaged over the layers."""
    totals, probs = decoder.router_totals, _stacked([layer.probs for layer in layers])
    step = totals.load_of_step
    if step is None:
        tokens = _stacked([layer.tokens for layer in layers])
        step = totals.load_so_far(load, tokens, keep=counts)
    return balance(step.load.to(probs), step.tokens.to(probs), probs, decoder.config.num_experts).mean()


def _stacked(values: list[Any]) -> torch.Tensor:
    """Stacks the tensors of all layers, on the device of the last layer."""
    return torch.stack([value.to(values[-1].device) for value in values])


def _mean(values: tuple[torch.Tensor | None, ...], device: torch.device) -> torch.Tensor | None:
    """Averages the scalars of all layers; layers without one count as 0, and None means that no layer has one."""
    known = [value.to(device) for value in values if value is not None]
    return torch.stack(known).sum() / len(values) if known else None
