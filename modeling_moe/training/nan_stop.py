# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module stops a `Trainer` at the first loss or gradient that is not finite, and names where it arose."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from ..utils.errors import UserError


class NonFiniteError(UserError):
    """A loss, gradient or weight is not finite; the message names the step and the layer."""


class MicroBatch(NamedTuple):
    """The inputs of one micro-batch, and the states of the random number generators (CPU, device) before it."""

    inputs: dict[str, Any]
    num_items: Any
    generators: tuple[torch.Tensor, ...]


class Cause(NamedTuple):
    """A finding; of several, the one that sorts first caused the others."""

    rank: int
    micro_batch: int
    text: str


class ForwardRecord:
    """The modules in the order in which they ended, and the name of the first with an output that is not finite."""

    def __init__(self):
        self.order: list[tuple[str, nn.Module]] = []
        self.first_bad: str | None = None

    def bad_gradient(self) -> str | None:
        """Returns the name of the parameter nearest to the loss whose gradient is not finite, or None."""
        names: dict[nn.Parameter, str] = {}
        for module_name, module in self.order:
            for name, parameter in module.named_parameters(recurse=False):
                # backward reaches a shared parameter last where it is used first
                names.setdefault(parameter, f"{module_name}.{name}")
        return next((name for parameter, name in reversed(names.items()) if not _is_finite(parameter.grad)), None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(_local(tensor).isfinite().all())


def _has_nan_or_inf(output: Any) -> bool:
    # routers mask logits with -inf
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return any(bool((_local(tensor).isnan() | (_local(tensor) == float("inf"))).any()) for tensor in tensors)


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[ForwardRecord]:
    """Yields a record that the forward passes of `model` fill inside the block."""
    record = ForwardRecord()

    def hook_of(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record.order.append((name, module))
            if record.first_bad is None and _has_nan_or_inf(output):
                record.first_bad = name

        return hook

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _generators(device: torch.device) -> tuple[torch.Tensor, ...]:
    states = (torch.get_rng_state(),)
    return states if device.type == "cpu" else (*states, torch.get_device_module(device).get_rng_state())


def _set_generators(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)


def _bad_weights(model: nn.Module) -> list[str]:
    # DeepSpeed's ZeRO-3 keeps this process's part of a parameter in `ds_tensor`
    parts = ((name, getattr(parameter, "ds_tensor", parameter)) for name, parameter in model.named_parameters())
    return [name for name, part in parts if not _is_finite(part)]


class NanStopMixin(Trainer):
    """Stops training at the first loss or gradient that is not finite; put it before another `Trainer` class.

    Once per optimizer step, before clipping, it checks the losses of the micro-batches and the gradients (not under a
    gradient scaler, which checks them itself). This waits for the device once. If one is not finite, all processes run
    the forward passes of the step again with the same random numbers and hooks on all modules, and raise
    [`NonFiniteError`]. The optimizer has not stepped then, and saved checkpoints are unchanged. Weights are checked
    before a checkpoint is saved.

    Example:
        >>> class MyTrainer(NanStopMixin, SFTTrainer):
        ...     pass
    """

    _step_batches: tuple[MicroBatch, ...] = ()
    _bad: torch.Tensor

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Computes one micro-batch as `Trainer` does, and checks the step after its last micro-batch."""
        # a copy, since some trainers remove the labels from the inputs
        batch = MicroBatch(dict(inputs), num_items_in_batch, _generators(self.args.device))
        self._step_batches = (*self._step_batches, batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        bad = ~loss.detach().isfinite().all()
        self._bad = bad if len(self._step_batches) == 1 else self._bad | bad
        if self.accelerator.sync_gradients:
            if self._is_step_bad(model):
                self._stop(model)
            self._step_batches = ()
        return loss

    def check_weights(self) -> None:
        """Raises [`NonFiniteError`] if a weight is not finite; all processes must call it."""
        weights: list[str] = gather_object(_bad_weights(self.accelerator.unwrap_model(self.model)))
        if weights:
            raise NonFiniteError(
                f"step {self.state.global_step}: the weight {weights[0]} is not finite; it was not saved: lower "
                "learning_rate, and resume from the last checkpoint"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as `Trainer` does, but no checkpoint with weights that are not finite."""
        if _internal_call:  # all processes make the trainer's own calls, and a user's call may come from one
            self.check_weights()
        super().save_model(output_dir, _internal_call)

    def _is_step_bad(self, model: nn.Module) -> bool:
        """Returns on all processes whether a loss or gradient of any process is not finite."""
        bad = self._bad
        gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        if self.accelerator.scaler is None and gradients:
            bad = bad | ~nn.utils.get_total_norm(gradients, float("inf")).isfinite()
        return bool(self.accelerator.reduce(bad.to(torch.float32), "sum"))

    def _stop(self, model: nn.Module) -> None:
        causes: list[Cause] = sorted(gather_object(self._find_causes(model)))
        text = causes[0].text if causes else "a loss or gradient is not finite, although a second run of the batch is"
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: {text}; the step was not taken: lower learning_rate or look at the "
            "data, and resume from the last checkpoint"
        )

    @torch.no_grad()
    def _find_causes(self, model: nn.Module) -> list[Cause]:
        """Runs the forward passes of the step again, and returns what is not finite on this process."""
        bare = self.accelerator.unwrap_model(model)
        causes = [Cause(0, 0, f"the weight {name} is not finite") for name in _bad_weights(bare)[:1]]
        # every process runs all its batches, since the forward pass of a split model is collective
        for number, batch in enumerate(self._step_batches):
            _set_generators(self.args.device, batch.generators)
            with watch_outputs(bare) as record, self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(batch.inputs), num_items_in_batch=batch.num_items)
            assert isinstance(loss, torch.Tensor)  # without `return_outputs`
            loss_text = f"the loss is {loss.item()}, and"
            if record.first_bad is not None:
                text = f"{loss_text} the first output that is not finite is that of {record.first_bad}"
                causes.append(Cause(1, number, text))
            elif not _is_finite(loss):
                causes.append(Cause(2, number, f"{loss_text} the outputs of all layers are finite"))
            elif (gradient := record.bad_gradient()) is not None:
                causes.append(Cause(3, number, f"all outputs are finite, and the gradient of {gradient} is not"))
        return causes
