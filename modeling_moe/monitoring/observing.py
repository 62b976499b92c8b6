# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module observes what each sparse layer of any MoE does with its tokens, by hooks where transformers calls the experts.

# B rows, S tokens per row, T = B*S tokens, H hidden, E experts, Z experts without weights, K choices per token
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..router import Routing
from .batches import Batch, Batches, argument_names
from .layers import SparseLayer, sparse_layers
from .local_ids import hides_ids, restore


class LayerPass(NamedTuple):
    """What a sparse layer does with its tokens in one forward pass; tensors carry their gradients.

    Attributes:
        layer: the sparse layer.
        hidden_states: (T, H) input of the experts.
        index: (T, K) integer ids of the chosen experts before capacity; E and above have no weights.
        weight: (T, K) combine weights.
        arrived: (T, K) integer ids that reach the experts, after capacity.
        logits: (T, E + Z) what the router returned as router logits; None if unknown.
        probs: (T, E + Z) the probabilities of this package's routers; None for others.
        token_mask: (T,) bool, False at padding; None without padding, and in a repeated pass.
        batch_size: number B of rows of T / B tokens; 1 in a repeated pass of a model of transformers.
        recomputed: whether activation checkpointing repeats the pass inside backward, where the model has ended and its
            arguments are unknown.
        training: whether the layer is in training mode and the caller's pass records gradients.
        note: why padding may count as tokens; None if padding is known.
        places: (T,) int64 place of each token among all tokens of the batch, in a layer that processes only some
            (`depth_layers`), -1 at padding; None in a layer that processes all.
    """

    layer: SparseLayer
    hidden_states: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    arrived: torch.Tensor
    logits: torch.Tensor | None
    probs: torch.Tensor | None
    token_mask: torch.Tensor | None
    batch_size: int
    recomputed: bool
    training: bool
    note: str | None = None
    places: torch.Tensor | None = None


OnPass = Callable[[LayerPass], torch.Tensor | None]


OnFailure = Callable[[Exception], None]


class ModelHook:
    """A hook that only the observed model has: a copy of the model, or a model read from a pickle, gets one that does nothing.

    Args:
        function: what the hook calls; None for nothing.
        on_failure: function that gets an exception of `function`, so that the model runs on; by default the exception is raised.
    """

    def __init__(self, function: Callable | None = None, on_failure: OnFailure | None = None):
        self.function, self.on_failure = function, on_failure

    def __call__(self, *args: Any) -> Any:
        if self.function is None:
            return None
        if self.on_failure is None:
            return self.function(*args)
        try:
            return self.function(*args)
        except Exception as error:
            self.on_failure(error)

    def __reduce__(self) -> tuple:
        return ModelHook, ()


def in_backward() -> bool:
    """Returns True inside a backward pass, where activation checkpointing repeats forward passes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _RouterOutput(NamedTuple):
    """What the router of a layer returned, until its experts are called."""

    args: tuple
    output: Any


class Observation:
    """Hooks on a model that end with [`Observation.remove`] or at the end of a `with` block.

    Attributes:
        layers: the sparse layers of the model.
    """

    def __init__(self, model: nn.Module, on_pass: OnPass, on_failure: OnFailure | None = None):
        self.layers = sparse_layers(model)
        self._on_pass, self._on_failure = on_pass, on_failure
        self._batches = Batches()
        self._outputs: dict[str, _RouterOutput] = {}
        self._handles: list = []
        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                self._watch_batches(module)
        for layer in self.layers:
            self._watch_layer(layer)

    def __enter__(self) -> "Observation":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Removes all hooks; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self._outputs.clear()

    def _watch_batches(self, module: nn.Module) -> None:
        names = argument_names(module) if isinstance(module, PreTrainedModel) else None

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._batches.enter(names, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(self._hook(enter), with_kwargs=True, prepend=True))
        self._handles.append(module.register_forward_hook(self._hook(self._batches.leave), always_call=True))

    def _hook(self, function: Callable) -> ModelHook:
        return ModelHook(function, self._on_failure)

    def _watch_layer(self, layer: SparseLayer) -> None:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if module is layer.router:
                self._outputs[layer.name] = _RouterOutput(args, output)

        def observe_experts(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
            if module is not layer.experts:
                raise ValueError(
                    "nn.DataParallel runs copies of the model side by side, whose routing cannot be seen: start one process "
                    "for each device, by accelerate launch or torchrun."
                )
            return self._observe(layer, args, kwargs)

        if layer.router is not None:
            self._handles.append(layer.router.register_forward_hook(self._hook(keep)))
        self._handles.append(
            layer.experts.register_forward_pre_hook(self._hook(observe_experts), with_kwargs=True, prepend=True)
        )

    def _observe(self, layer: SparseLayer, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Calls `on_pass` for a call of a layer's experts; returns the call's arguments if `on_pass` replaces the weights."""
        call = (
            dict(zip(("hidden_states", "top_k_index", "top_k_weights", "gates", "frozen"), args, strict=False))
            | kwargs
        )
        if call.get("frozen"):
            # a straight-through estimate of the router's gradient, before the call with the chosen experts
            return None
        kept = self._outputs.pop(layer.name, None)
        context = None
        if layer.returns_routing and kept is not None:
            states, context = (*kept.args, None)[:2]
            # a wrapper or a hook of the gate may return a plain tuple
            event = _own_pass(layer, call, Routing(*kept.output), states)
        else:
            event = _foreign_pass(layer, call, kept)
        own = None
        if hides_ids(layer.experts, layer.num_experts):
            choice = restore(layer.experts, event.index, event.weight, layer.num_experts)
            event, own = event._replace(index=choice.index, arrived=choice.index, weight=choice.weight), choice.own
        recomputed = in_backward()
        batch = Batch(True) if recomputed else self._batches.current
        event = event._replace(recomputed=recomputed, training=layer.experts.training and batch.records_gradient)
        event = _with_mask(event, batch, context)
        weight = self._on_pass(event)
        if weight is None:
            return None
        if event.index.shape[-1] != call["top_k_index"].shape[-1] or "gates" in call:
            raise ValueError(
                f"the weights of {layer.name} cannot be replaced: its router does not choose experts by weight."
            )
        given = call["top_k_weights"]
        weight = weight if own is None else weight.where(own, 0.0)
        call["top_k_weights"] = weight.reshape(given.shape).to(given.dtype)
        # by position: gpt-oss's own function has other names for these arguments
        return tuple(call.pop(name) for name in ("hidden_states", "top_k_index", "top_k_weights")), call


def _own_pass(layer: SparseLayer, call: dict[str, Any], routing: Routing, tokens: torch.Tensor) -> LayerPass:
    """Describes a pass of this package's sparse block."""
    arrived = call["top_k_index"]
    if arrived.shape != routing.index.shape or "gates" in call:
        arrived = routing.index  # the router mixes tokens or experts' weights, and drops nothing
    elif getattr(layer.experts, "num_experts", layer.num_experts) < layer.num_experts:
        # under expert parallelism the block gives an empty assignment to expert 0, with weight 0
        empty = (arrived != routing.index) | ((arrived == 0) & (call["top_k_weights"] == 0))
        arrived = routing.index.where(~empty | (routing.index >= layer.num_experts), routing.logits.shape[-1])
    # the experts of `moe_latent_size` read other features than the router; those of `soft_moe` read no tokens
    states = call["hidden_states"] if len(call["hidden_states"]) == len(tokens) else tokens
    return LayerPass(
        layer, states, routing.index, routing.weight, arrived, routing.logits, routing.probs, None, 1, False, False
    )


def _foreign_pass(layer: SparseLayer, call: dict[str, Any], kept: _RouterOutput | None) -> LayerPass:
    """Describes a pass of a sparse block of transformers."""
    states = call["hidden_states"].reshape(-1, call["hidden_states"].shape[-1])
    index, weight = (call[name].reshape(len(states), -1) for name in ("top_k_index", "top_k_weights"))
    logits = None
    output = () if kept is None else kept.output if isinstance(kept.output, tuple) else (kept.output,)
    if layer.logits_index < len(output) and isinstance(output[layer.logits_index], torch.Tensor):
        found = output[layer.logits_index]
        if found.is_floating_point() and found.shape[-1] >= layer.num_experts:
            found = found.reshape(-1, found.shape[-1])
            logits = found if len(found) == len(states) else None
    return LayerPass(layer, states, index, weight, index, logits, None, None, 1, False, False)


def _with_mask(event: LayerPass, batch: Batch, context: Any) -> LayerPass:
    """Adds to a pass what is known of its rows and of padding, from this package's context or from the model's arguments."""
    if context is not None and context.token_mask is not None:
        return event._replace(token_mask=context.token_mask > 0, batch_size=context.batch_size, places=context.places)
    mask, rows, note = batch.mask_of(len(event.hidden_states), event.hidden_states.device)
    return event._replace(token_mask=mask, batch_size=rows if context is None else context.batch_size, note=note)


def observe(model: nn.Module, on_pass: OnPass, on_failure: OnFailure | None = None) -> Observation:
    """Calls `on_pass` for each pass of each sparse layer of any MoE, before the experts compute.

    Args:
        model: any model of transformers whose experts follow its experts interface.
        on_pass: function of a [`LayerPass`]; if it returns a tensor (T, K), the experts get it in place of their weights.
        on_failure: function that gets an exception of a hook or of `on_pass`, after which the model runs on as if it were not
            observed; by default the exception ends the model's pass.

    Returns:
        A context manager, and a handle with `remove()`.

    Raises:
        UnreachableRouting: if the model is dense, or its experts cannot be reached.
    """
    return Observation(model, on_pass, on_failure)
