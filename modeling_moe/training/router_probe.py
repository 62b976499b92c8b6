# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs the router of one sparse layer on a few random tokens, to learn what a router does.

# T tokens, H hidden, E experts, Z experts without weights, K choices per token
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..monitoring import SparseLayer, sparse_block


PROBE_TOKENS = 16


class Choice(NamedTuple):
    """What a router chose for the random tokens.

    Attributes:
        index: (T, K) ids of the chosen experts.
        weight: (T, K) combine weights.
        logits: (T, E + Z) router logits; None if unknown.
    """

    index: torch.Tensor
    weight: torch.Tensor
    logits: torch.Tensor | None


class ProbeError(RuntimeError):
    """The module that holds the experts cannot be run alone."""


class _AtExperts(Exception):
    """Ends a probe where the experts would compute; holds the arguments of the experts."""

    def __init__(self, index: torch.Tensor, weight: torch.Tensor):
        super().__init__()
        self.index, self.weight = index, weight


class RouterProbe:
    """Runs a sparse block on random tokens up to its experts, in evaluation mode.

    Args:
        model: model that holds the layer.
        layer: the sparse layer.

    Attributes:
        block: module that holds the experts.
    """

    def __init__(self, model: nn.Module, layer: SparseLayer):
        self.block, self.layer = sparse_block(model, layer), layer
        config: Any = next(module.config for module in model.modules() if isinstance(module, PreTrainedModel))
        self._hidden_size = config.get_text_config().hidden_size

    @torch.no_grad()
    def run(self) -> Choice:
        """Returns the router's choice; equal weights give an equal choice.

        Raises:
            ProbeError: if the block needs more than hidden states, or its weights are split over processes or not loaded.
        """
        weights = [weight for weight in self.block.parameters() if weight.dim() > 1 and weight.is_floating_point()]
        if not weights or any(isinstance(weight, DTensor) or weight.is_meta or not len(weight) for weight in weights):
            raise ProbeError(f"{type(self.block).__name__} holds no whole weights")
        # a router may be in fp32 beside experts in 16 bits, whose dtype is that of the model's hidden states
        like = next((w for w in self.layer.experts.parameters() if w.dim() > 1 and w.is_floating_point()), weights[0])
        tokens = torch.randn(1, PROBE_TOKENS, self._hidden_size, generator=torch.Generator().manual_seed(0))
        logits: list[torch.Tensor] = []
        with self._hooks(logits), _evaluating(self.block):
            try:
                self.block(tokens.to(like))
            except _AtExperts as reached:
                index, weight = (x.reshape(PROBE_TOKENS, -1) for x in (reached.index, reached.weight))
                return Choice(index, weight, logits[-1].reshape(PROBE_TOKENS, -1).clone() if logits else None)
            except (TypeError, RuntimeError, IndexError, AttributeError) as error:
                raise ProbeError(f"{type(self.block).__name__} does not run alone") from error
        raise ProbeError(f"{type(self.block).__name__} does not call its experts")

    @contextmanager
    def _hooks(self, logits: list[torch.Tensor]) -> Iterator[None]:
        """Keeps the router logits, and ends the run at the experts."""

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            logits.append((output if isinstance(output, tuple) else (output,))[self.layer.logits_index])

        def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            raise _AtExperts(call["top_k_index"], call["top_k_weights"])

        handles = [self.layer.experts.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)]
        if self.layer.router is not None:
            handles.append(self.layer.router.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Puts a block into evaluation mode, in which no noise is drawn."""
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
