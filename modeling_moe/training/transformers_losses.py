# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module switches off the balance loss of transformers' own models, and that of TRL, so that no loss counts twice.

Both are computed from the router logits that a model returns. The logits lose their gradient, which works whoever computes
the loss, and the factor of the model's own loss becomes 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


class TransformersLossesOff:
    """Keeps the balance losses of transformers and TRL switched off until [`TransformersLossesOff.restore`].

    TRL's `SFTTrainer` sets `config.output_router_logits`, with which `generate` may fail after saving. The configuration
    gets its value back by [`TransformersLossesOff.restore_config`].

    Args:
        models: models whose `forward` returns router logits, one inside another.
        trains: says whether the pass that ends trains the losses of this package.
    """

    def __init__(self, models: list[PreTrainedModel], trains: Callable[[], bool]):
        configs = {id(c): c for model in models for c in (model.config, model.config.get_text_config())}
        self._flags = [(c, c.output_router_logits) for c in configs.values() if hasattr(c, "output_router_logits")]
        self._factors: list[tuple[PreTrainedModel, float]] = []
        self._handles = []

        # a function, not a method: a deep copy of the model would copy this object with a method
        def detach(model: Any, args: tuple, output: Any) -> None:
            if trains() and getattr(output, "router_logits", None):
                output.router_logits = tuple(
                    logits.detach() if isinstance(logits, torch.Tensor) else logits for logits in output.router_logits
                )

        for model in models:
            self._handles.append(model.register_forward_hook(detach))
            if "router_aux_loss_coef" in vars(model):
                self._factors.append((model, vars(model)["router_aux_loss_coef"]))
                vars(model)["router_aux_loss_coef"] = 0.0

    def restore_config(self) -> None:
        """Gives `output_router_logits` of the configurations the values that they had."""
        for config, flag in self._flags:
            config.output_router_logits = flag

    def restore(self) -> None:
        """Switches the losses on again."""
        while self._handles:
            self._handles.pop().remove()
        while self._factors:
            model, factor = self._factors.pop()
            vars(model)["router_aux_loss_coef"] = factor
        self.restore_config()
