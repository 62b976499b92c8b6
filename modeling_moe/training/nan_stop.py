# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Stops a `Trainer` at the first loss or gradient that is not finite, and names where it arose."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ..utils.errors import UserError


class NonFiniteError(UserError):
    """A loss or gradient that is not finite; the message names the step and the layer."""


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(_local(tensor).isfinite().all())


def _sound(output: Any) -> bool:
    """Whether a module's output has neither NaN nor inf; -inf is how routers mask logits."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return not any((_local(tensor).isnan() | (_local(tensor) == float("inf"))).any() for tensor in tensors)


class _Run:
    """What a forward pass showed: the modules in the order in which they ended, and the first with a bad output."""

    def __init__(self):
        self.order: list[tuple[str, nn.Module]] = []
        self.first_bad: str | None = None


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Run]:
    run, hooks = _Run(), []

    def look(name):
        def hook(module, args, output):
            run.order.append((name, module))
            if run.first_bad is None and not _sound(output):
                run.first_bad = name

        return hook

    try:
        hooks += [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
        yield run
    finally:
        for hook in hooks:
            hook.remove()


def _bad_gradient(run: _Run) -> str | None:
    """The parameter nearest to the loss whose gradient is bad: backward carries it from there to all before."""
    # a parameter shared by several modules counts where it is used first, behind all others in backward
    names = {}
    for module_name, module in run.order:
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, f"{module_name}.{name}")
    return next((name for parameter, name in reversed(names.items()) if not _finite(parameter.grad)), None)


def _rng_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    states = (torch.get_rng_state(),)
    return states if device.type == "cpu" else (*states, torch.get_device_module(device).get_rng_state())


def _set_rng_states(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _of_all_ranks(found: list) -> list[list]:
    if not _distributed():
        return [found]
    parts = [found] * distributed.get_world_size()
    distributed.all_gather_object(parts, found)
    return parts


def _bad_weights(model: nn.Module) -> list[str]:
    # of what DeepSpeed's ZeRO-3 has split, this process's part
    parts = ((name, getattr(parameter, "ds_tensor", parameter)) for name, parameter in model.named_parameters())
    return [name for name, part in parts if not _finite(part)]


class NanStopMixin:
    """Put it before a `Trainer` class, transformers' or one derived from it.

    Looks once per optimizer step, before clipping and with one wait for the device: at the losses of its micro-batches
    and, unless a gradient scaler does (fp16), at the gradients. At the first that is not finite, all ranks run the step's
    forward passes again, with hooks on all modules and the same random numbers, and raise [`NonFiniteError`]. The
    optimizer has not stepped then, and checkpoints are as they were. Weights are looked at before a checkpoint is saved.

    Example:
        >>> class MyTrainer(NanStopMixin, SFTTrainer):
        ...     pass
    """

    _seen: tuple = ()

    def training_step(self: Any, model, inputs, num_items_in_batch=None):
        """One micro-batch, as transformers' own."""
        # a copy, for some trainers take the labels out
        self._seen = (*self._seen, (dict(inputs), num_items_in_batch, _rng_states(self.args.device)))
        trainer: Any = super()
        loss = trainer.training_step(model, inputs, num_items_in_batch)
        bad = ~loss.detach().isfinite().all()
        self._bad = bad if len(self._seen) == 1 else self._bad | bad
        if self.accelerator.sync_gradients:
            if self._is_bad(model):
                self._stop(model)
            self._seen = ()
        return loss

    def check_weights(self: Any) -> None:
        """Raises [`NonFiniteError`] if the last step has left a weight that is not finite; all ranks must call it."""
        weights = list(chain.from_iterable(_of_all_ranks(_bad_weights(self.accelerator.unwrap_model(self.model)))))
        if weights:
            raise NonFiniteError(
                f"step {self.state.global_step}: the weight {weights[0]} is not finite; it was not saved: lower "
                "learning_rate, and resume from the last checkpoint"
            )

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' own; no checkpoint of weights that are not finite."""
        if _internal_call:  # on all ranks, which others need not be
            self.check_weights()
        trainer: Any = super()
        trainer.save_model(output_dir, _internal_call)

    def _is_bad(self: Any, model: nn.Module) -> bool:
        """The same answer on all ranks."""
        bad = self._bad
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if self.accelerator.scaler is None and gradients:
            bad = bad | ~nn.utils.get_total_norm([_local(grad) for grad in gradients], float("inf")).isfinite()
        bad = bad.to(torch.float32)
        if _distributed():
            distributed.all_reduce(bad)
        return bool(bad)

    def _stop(self: Any, model: nn.Module) -> None:
        causes = sorted(chain.from_iterable(_of_all_ranks(self._find(model))))
        cause = causes[0][-1] if causes else "a loss or gradient is not finite, although a second run of the batch is"
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: {cause}; the step was not taken: lower learning_rate or look at the "
            "data, and resume from the last checkpoint"
        )

    @torch.no_grad()
    def _find(self: Any, model: nn.Module) -> list[tuple[int, int, str]]:
        """What is wrong on this rank; what sorts first caused the rest."""
        bare = self.accelerator.unwrap_model(model)
        found = [(0, 0, f"the weight {name} is not finite") for name in _bad_weights(bare)[:1]]
        # all batches on all ranks, for the forward pass of a split model is collective
        for number, (inputs, num_items, states) in enumerate(self._seen):
            _set_rng_states(self.args.device, states)
            with _watched(bare) as run, self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items)
            says, gradient = f"the loss is {loss.item()}, and", _bad_gradient(run)
            if run.first_bad is not None:
                found.append((1, number, f"{says} the first output that is not finite is that of {run.first_bad}"))
            elif not _finite(loss):
                found.append((2, number, f"{says} the outputs of all layers are finite"))
            elif gradient is not None:
                found.append((3, number, f"all outputs are finite, and the gradient of {gradient} is not"))
        return found
