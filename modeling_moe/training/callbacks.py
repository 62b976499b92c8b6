# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a `Trainer` has to do for a Mixture of Experts beyond computing the loss."""

from torch import nn
from transformers import TrainerCallback

from ..balancing import update_routers


def _set_router_loss_scale(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if "router_loss_scale" in vars(module):
            vars(module)["router_loss_scale"] = scale


class MoECallback(TrainerCallback):
    """Balances the experts' load without gradient and keeps the router losses' weight under gradient accumulation.

    After each optimizer step it steps the routers' controllers, which move selection biases, thresholds and the like
    ([`~modeling_moe.balancing.update_routers`]).
    During training it divides router losses that attach themselves, where the trainer computes the loss without our
    head (label smoothing, TRL), by the gradient accumulation steps. Both reach through PEFT, DDP and FSDP wrappers,
    and do nothing to a model without experts.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[MoECallback()])
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Scales the router losses of one micro-batch."""
        _set_router_loss_scale(kwargs["model"], 1 / args.gradient_accumulation_steps)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Steps the controllers."""
        update_routers(kwargs["model"])

    def on_train_end(self, args, state, control, **kwargs):
        """Takes the scale back."""
        _set_router_loss_scale(kwargs["model"], 1.0)
