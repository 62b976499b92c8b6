# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives a module a router, the capacity of the router's experts, and the controller that balances the experts."""

from typing import Any

import torch

from .router import Router, Routing, RoutingContext, router_dtype
from .router_balancing import CONTROLLERS
from .router_capacity import Capacity


class Routed:
    """A part of modules that choose experts for each token; a module also inherits `torch.nn.Module`.

    Attributes:
        gate: the router, or what PEFT has put around it.
        routing_config: the configuration as the router reads it.
        capacity: limits the tokens of an expert.
        controller: moves the router's buffers after an optimizer step; None without one.
    """

    training: bool
    gate: Any

    def add_router(self, router: type[Router], routing_config: Any, layer_idx: int, controlled: bool = True) -> None:
        """Makes the router of layer `layer_idx`, and with it capacity and controller.

        Args:
            router: class of the router.
            routing_config: the configuration as the router reads it.
            layer_idx: index of the decoder layer.
            controlled: whether the configuration's controller moves this router.
        """
        self.routing_config = routing_config
        self.gate = router(routing_config, layer_idx)
        # transformers sets the default dtype to the model's while it makes a model
        if (dtype := router_dtype(torch.get_default_dtype())) != torch.get_default_dtype():
            self.gate.to(dtype)
        self.capacity = Capacity(routing_config, layer_idx)
        name = routing_config.controller
        self.controller = CONTROLLERS[name] if controlled and name is not None else None

    @property
    def router(self) -> Router:
        """Returns the router, also where PEFT has replaced `gate` by a layer around the router."""
        router: Any = self.gate
        while not hasattr(router, "auxiliary_loss"):
            router = router.base_layer
        return router

    def route(self, tokens: torch.Tensor, context: RoutingContext) -> tuple[Routing, Routing]:
        """Routes tokens (T, H); returns the routing before capacity and the routing after capacity."""
        # a wrapper or a hook of the gate may return a plain tuple
        chosen = Routing(*self.gate(tokens, context))
        return chosen, self.capacity(chosen, context, self.training)
