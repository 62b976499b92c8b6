# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a sparse layer tells the model beside its output, and what the model makes of it: losses, load and statistics.

Signals leave a layer as outputs, and not on the side, because that is what every kind of checkpointing differentiates.

# E experts, Z experts without weights, L sparse layers
"""

from typing import Any, NamedTuple

import torch

from .router import Routing, RoutingContext, expert_load
from .router_balancing import CONTROLLERS, all_ranks, warn_if_forgotten
from .router_capacity import count_dropped
from .router_losses import LOSSES, TokenWeights, balance, mean_probs, router_losses


class RouterSignals(NamedTuple):
    """What a sparse layer tells the model beside its output; tensors, so that checkpointing recomputes them.

    Attributes:
        losses: (losses,), the router losses and last the router's own.
        load: (E + Z,), tokens sent to each expert.
        probs: (E + Z,), mean probabilities of the weighted tokens.
        statistics: (n,), what the controller measures; nothing without one.
        dropped: (2,), assignments dropped and made.
    """

    losses: torch.Tensor
    load: torch.Tensor
    probs: torch.Tensor
    statistics: torch.Tensor
    dropped: torch.Tensor


def measure(
    block: Any, chosen: Routing, routing: Routing, context: RoutingContext, weights: TokenWeights
) -> RouterSignals:
    """The signals of a sparse block, from its routing before and after capacity."""
    mask = context.token_mask
    losses = router_losses(chosen, context, block.config, weights)
    # a router's own buffers are for training: where weights are offloaded they lie elsewhere
    auxiliary_loss = block.router.auxiliary_loss(chosen, mask) if block.training else None
    with torch.no_grad():
        statistics = losses.new_zeros(0)
        if block.controller is not None and block.training:
            statistics = block.controller.measure(block.router, chosen, mask)
        elif block.config.controller is not None:
            statistics = losses.new_zeros(CONTROLLERS[block.config.controller].size(block.config.num_router_outputs))
    return RouterSignals(
        losses=torch.cat([losses, losses.new_zeros(1) if auxiliary_loss is None else auxiliary_loss[None]]),
        load=expert_load(chosen, mask),
        probs=mean_probs(chosen, weights.weight)[0],
        statistics=statistics,
        dropped=count_dropped(chosen, routing, mask),
    )


def collect(decoder: Any, layers: list[RouterSignals]) -> dict[str, torch.Tensor]:
    """What the layers' signals add to the output of a [`MoEModel`]; in training also counts for the controllers.

    A pass without gradient, such as that of a reference model which is this one without its adapter, does not count.
    """
    config, totals = decoder.config, decoder.router_totals
    device = layers[-1].losses.device
    signals = RouterSignals(*(torch.stack([x.to(device) for x in field]) for field in zip(*layers, strict=True)))
    losses = signals.losses.mean(dim=0)
    counts = decoder.training and (torch.is_grad_enabled() or totals.counting)
    if counts:
        warn_if_forgotten(decoder)
    if decoder.training and totals.load is not None:
        load = totals.load_of_step
        if load is None:
            load = totals.load + all_ranks(signals.load.detach().to(totals.load))
            if counts:
                totals.load.copy_(load)
        # `LOSSES` begins with the balance loss
        global_balance = balance(load.to(signals.probs), signals.probs, config.num_experts).mean()
        losses = torch.cat([global_balance[None], losses[1:]])
    outputs = {"aux_loss": losses[0].detach(), "expert_load": signals.load.detach()}
    if config.has_capacity:
        outputs["dropped_share"] = signals.dropped[:, 0] / signals.dropped[:, 1].clamp(min=1)
    if decoder.training and decoder.has_router_losses:
        coefficients = losses.new_tensor([*(getattr(config, name) for name in LOSSES), 1.0])
        outputs["router_loss"] = (coefficients * losses).sum()
    if counts and totals.statistics is not None:
        totals.statistics += signals.statistics.detach().to(totals.statistics)
    if counts and totals.dropped is not None:
        totals.dropped += signals.dropped.sum(dim=0).to(totals.dropped)
    return outputs
