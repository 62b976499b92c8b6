# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module switches off the balance loss of transformers' own models, and that of TRL, so that no loss counts twice.

Both are computed from the router logits that a model returns. In a training pass the logits lose their gradient, which works
whoever computes the loss, and the factor of the model's own loss is 0.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..monitoring import ModelHook


FACTOR = "router_aux_loss_coef"
FLAG = "output_router_logits"


def _configs(models: Iterable[PreTrainedModel]) -> list[Any]:
    """Returns the configurations of models and of the text models inside them, each once."""
    found = (config for model in models for config in (model.config, model.config.get_text_config()))
    return list({id(config): config for config in found}.values())


@contextmanager
def without_router_logits(model: nn.Module) -> Iterator[None]:
    """Sets `output_router_logits` to False inside the block, so that the loss of an evaluation is the cross entropy alone."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    flags = [(config, getattr(config, FLAG)) for config in _configs(models) if hasattr(config, FLAG)]
    try:
        for config, _ in flags:
            setattr(config, FLAG, False)
        yield
    finally:
        for config, flag in flags:
            setattr(config, FLAG, flag)


class TransformersLossesOff:
    """Switches the balance losses of transformers and TRL off in training passes, until [`TransformersLossesOff.restore`].

    TRL's `SFTTrainer` sets `config.output_router_logits`, with which `generate` may fail after saving. The configuration
    gets its value back by [`TransformersLossesOff.restore_config`].

    Args:
        models: models whose `forward` returns router logits, one inside another, the outermost first.
        trains: says whether the pass that runs trains the losses of this package.
    """

    def __init__(self, models: list[PreTrainedModel], trains: Callable[[], bool]):
        configs = _configs(models)
        self._flags = [(config, getattr(config, FLAG)) for config in configs if hasattr(config, FLAG)]
        # a model has the factor as an attribute, or reads it from its configuration in each pass
        self._holders = [vars(holder) for holder in (*models, *configs) if FACTOR in vars(holder)]
        self._factors: list[tuple[dict[str, Any], float]] = []
        self._trains = trains
        # the first hooks after a pass, since the pass has no frame after those of `BatchFrames`
        self._handles = [model.register_forward_hook(ModelHook(self._detach), prepend=True) for model in models]
        self._handles += [
            models[0].register_forward_pre_hook(ModelHook(torch.compiler.disable(self._take_factors))),
            models[0].register_forward_hook(
                ModelHook(torch.compiler.disable(self._restore_factors)), always_call=True
            ),
        ]

    def _detach(self, model: Any, args: tuple, output: Any) -> None:
        if self._trains() and getattr(output, "router_logits", None):
            output.router_logits = tuple(
                logits.detach() if isinstance(logits, torch.Tensor) else logits for logits in output.router_logits
            )

    def _take_factors(self, *_: Any) -> None:
        """Sets the factors to 0 until the end of the pass."""
        self._restore_factors()  # Ctrl-C ended the pass before, which calls no hook
        if self._trains():
            self._factors = [(holder, holder[FACTOR]) for holder in self._holders]
            for holder in self._holders:
                holder[FACTOR] = 0.0

    def _restore_factors(self, *_: Any) -> None:
        while self._factors:
            holder, factor = self._factors.pop()
            holder[FACTOR] = factor

    def restore_config(self) -> None:
        """Gives `output_router_logits` of the configurations the values that they had."""
        for config, flag in self._flags:
            setattr(config, FLAG, flag)

    def restore(self) -> None:
        """Switches the losses on again."""
        while self._handles:
            self._handles.pop().remove()
        self._restore_factors()
        self.restore_config()
