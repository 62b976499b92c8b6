# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module keeps what a batch says of its tokens while the layers of a model run, also when checkpointing repeats a layer.

Activation checkpointing repeats a layer inside backward, when the model has ended and another batch may have passed. The
module therefore puts a wrapper around the checkpointing function that transformers gives to a layer: the wrapper takes the
frame of the batch along.

# B rows, S tokens per row, T = B*S tokens
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compatibility import CACHE_NAMES
from ..model_packing import find_beginnings
from ..router import RoutingContext
from ..router_losses import TokenWeights, loss_share, predicts_label, weigh_tokens
from .observing import LayerPass, ModelHook


# arguments that the loss reads, which the caller of the outermost model gives
LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")
# arguments that mark the sequences of packed rows, as the innermost model gets them
PACKING_ARGUMENTS = ("position_ids", "cu_seq_lens_q")
# arguments that say which tokens the batch holds, as the outermost model that names them gets them
TOKEN_ARGUMENTS = ("input_ids", "attention_mask", *CACHE_NAMES)


class BatchFrame:
    """What one batch says of its tokens.

    Attributes:
        records_gradient: whether the caller of the outermost model records gradients.
        arguments: those of [`LOSS_ARGUMENTS`], [`PACKING_ARGUMENTS`] and [`TOKEN_ARGUMENTS`] that the models were given.
    """

    def __init__(self, records_gradient: bool):
        self.records_gradient = records_gradient
        self.arguments: dict[str, Any] = {}
        self._contexts: dict[str, RoutingContext] = {}
        self._weights: dict[tuple[int, int], TokenWeights] = {}

    def add(self, kwargs: dict[str, Any]) -> None:
        """Notes the arguments of the next inner model."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        for name in (*LOSS_ARGUMENTS, *TOKEN_ARGUMENTS):
            if name in given:
                self.arguments.setdefault(name, given[name])
        for name in PACKING_ARGUMENTS:
            if name in given:
                self.arguments[name] = given[name]

    def context(self, event: LayerPass) -> RoutingContext:
        """Returns the rows, the padding and the sequences of a layer's pass.

        Raises:
            RuntimeError: if a repeated layer did not run on this batch before.
        """
        if event.recomputed:
            if event.layer.name not in self._contexts:
                raise RuntimeError(f"checkpointing repeats {event.layer.name}, which did not run on the batch before.")
            return self._contexts[event.layer.name]
        tokens, rows = len(event.index), event.batch_size
        shape = (rows, tokens // rows)
        mask = None if event.token_mask is None else event.token_mask.view(shape)
        positions, ends = (self.arguments.get(name) for name in PACKING_ARGUMENTS)
        if positions is not None and positions.shape not in (shape, (1, shape[1])):
            positions = None  # positions of several axes, or of other tokens
        begins = find_beginnings(shape, positions, mask, ends) if shape[1] > 1 else None
        context = RoutingContext(
            rows, event.token_mask, begins=None if begins is None else begins.flatten().to(event.index.device)
        )
        self._contexts[event.layer.name] = context
        return context

    def token_weights(self, context: RoutingContext, tokens: int, dtype: torch.dtype, device: Any) -> TokenWeights:
        """Returns the weights of the tokens in the router losses; the layers of a batch share them."""
        shape = (context.batch_size, tokens // context.batch_size)
        if shape not in self._weights:
            mask = torch.ones(shape, dtype=dtype, device=device)
            if context.token_mask is not None:
                mask = context.token_mask.view(shape).to(mask)
            counted = self._counted_labels(shape)
            self._weights[shape] = weigh_tokens(mask, context.by_row(context.begins), counted)
        weights = self._weights[shape]
        return weights._replace(weight=weights.weight.to(device), sequence=weights.sequence.to(device))

    def _counted_labels(self, shape: tuple[int, int]) -> torch.Tensor | None:
        """Returns where a token (B, S) predicts a label of a step whose labels are counted, otherwise None."""
        labels = self.arguments.get("labels")
        if labels is None or "num_items_in_batch" not in self.arguments or labels.shape != shape:
            return None
        return predicts_label(labels, self.arguments.get("shift_labels"))

    def share(self) -> torch.Tensor | None:
        """Returns the share of the step's labels that the batch holds, a scalar; None if the step's labels are not counted."""
        labels, items = self.arguments.get("labels"), self.arguments.get("num_items_in_batch")
        if labels is None or items is None:
            return None
        # a classifier of sequences has one label for each row, which is not shifted
        shifted = labels if labels.dim() < 2 else self.arguments.get("shift_labels")
        share = loss_share(labels, items, shift_labels=shifted)
        assert isinstance(share, torch.Tensor)  # a number without `items` only
        return share


class _FrameCarrier:
    """A checkpointing function that runs a layer, and repeats it, within the frame of the batch of its first run."""

    def __init__(self, function: Callable, frames: "BatchFrames"):
        self.function, self.frames = function, frames

    def __call__(self, layer: Callable, *args: Any, **kwargs: Any) -> Any:
        frame = self.frames.current

        def run(*layer_args: Any, **layer_kwargs: Any) -> Any:
            with self.frames.within(frame):
                return layer(*layer_args, **layer_kwargs)

        return self.function(run, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable:
        return self.function  # a copy of the model has no frames

    def __reduce__(self) -> tuple:
        return _identity, (self.function,)


def _identity(function: Callable) -> Callable:
    return function


class BatchFrames:
    """Hooks on a model and on the models inside it that keep the frame of the batch which runs.

    Args:
        model: module that the training loop calls.
        layers: qualified names of the experts modules in the model.

    Attributes:
        current: frame of the batch that runs; None outside the model.
    """

    def __init__(self, model: nn.Module, layers: list[str]):
        self.current: BatchFrame | None = None
        self._running: list[nn.Module] = []
        above = {name[:end] for name in layers for end in range(len(name)) if name[end] == "."} | {""}
        self._above = [module for name, module in model.named_modules() if name in above]
        self.models = [module for module in self._above if isinstance(module, PreTrainedModel)]
        self._handles: list = []
        enter, leave = (ModelHook(torch.compiler.disable(hook)) for hook in (self._enter, self._leave))
        for module in (model, *(inner for inner in self.models if inner is not model)):
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ]

    def remove(self) -> None:
        """Removes the hooks, and the wrappers of the checkpointing functions."""
        while self._handles:
            self._handles.pop().remove()
        for module in self._above:
            function = vars(module).get("_gradient_checkpointing_func")
            if isinstance(function, _FrameCarrier):
                vars(module)["_gradient_checkpointing_func"] = function.function

    @contextmanager
    def within(self, frame: BatchFrame | None) -> Iterator[None]:
        """Makes a frame the current one inside the block."""
        before, self.current = self.current, frame
        try:
            yield
        finally:
            self.current = before

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(module is other for other in self._running):
            self._running.clear()  # Ctrl-C ended the batch before, which calls no hook
        if not self._running:
            self.current = BatchFrame(torch.is_grad_enabled())
            self._wrap_checkpointing()
        self._running.append(module)
        assert self.current is not None
        self.current.add(kwargs)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._running:
            self._running.pop()
            if not self._running:
                self.current = None

    def _wrap_checkpointing(self) -> None:
        """Wraps the checkpointing functions; `gradient_checkpointing_enable` may have set new ones since the last batch."""
        for module in self._above:
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _FrameCarrier):
                vars(module)["_gradient_checkpointing_func"] = _FrameCarrier(function, self)
