# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds the callbacks that a `Trainer` needs to train a Mixture of Experts beyond computing the loss."""

from contextlib import ExitStack

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_utils import has_length

from ..dispatch.backends.triton.casting import cast_once
from ..router_balancing import forget_counts, update_routers
from .balance import balances_of
from .restoring import RestoringError, load_from_disk_names, restore_hook


def _set_router_loss_scale(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if "router_loss_scale" in vars(module):
            vars(module)["router_loss_scale"] = scale


def _ranks_of_tokens(args: TrainingArguments, model: nn.Module) -> int:
    """Returns by what a `Trainer` multiplies a loss that was divided by the labels of all ranks: DDP averages gradients."""
    if not args.average_tokens_across_devices:
        return 1
    split = getattr(model, "_tp_size", None) or getattr(args.parallelism_config, "tp_size", None) or 1
    return args.world_size // split


def micro_batches(accumulation_steps: int, step: int, batches: int | None) -> int:
    """Returns the number of micro-batches of a `Trainer`'s optimizer step; the last step of an epoch may have fewer.

    Args:
        accumulation_steps: micro-batches of every other step.
        step: number of earlier optimizer steps, over all epochs.
        batches: micro-batches of an epoch; None if unknown.
    """
    if not batches:
        return accumulation_steps
    steps_in_epoch = -(-batches // accumulation_steps)
    left = batches - (steps_in_epoch - 1) * accumulation_steps
    return left if step % steps_in_epoch == steps_in_epoch - 1 else accumulation_steps


class MoECallback(TrainerCallback):
    """Steps the routers' controllers, scales attached router losses, and lets `Trainer` resume transformers' MoE
    models.

    Controllers: after each optimizer step the callback calls [`~modeling_moe.router_balancing.update_routers`], which
    moves selection biases, thresholds and the like.

    Attached router losses: where a trainer computes the loss without the model's head (TRL, label smoothing), router
    losses attach themselves to the hidden states, and the factors on the trainer's loss do not reach them. The
    callback sets these factors before each step: 1 over the number of micro-batches, and the loss scale of fp16
    training (but not DeepSpeed's). The gradient of a step is then the mean over its sequences, for every split into
    micro-batches of equally many sequences.

    Models of transformers under [`~modeling_moe.training.balance.balance`]: the callback scales their router losses too,
    by a micro-batch's share of the step's labels where `Trainer` counts labels, and steps their selection biases once per
    optimizer step. A step that fp16's loss scaler skips moves no bias.

    Resuming: the model's `load_state_dict` takes the names that the model's checkpoints have on disk
    ([`~modeling_moe.training.restoring`]). Resuming and `load_best_model_at_end` then load the experts and routers of
    transformers' own models too, from one file or from shards. A checkpoint that lacks a tensor is an error.

    The callback works through PEFT, DDP and FSDP wrappers, and does nothing for a model without experts. A second one
    in the same `Trainer` has no effect. [`~modeling_moe.training.enable`] gives one to each `Trainer` made later.

    Example:
        >>> from modeling_moe.training import MoECallback
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[MoECallback()])
    """

    def on_init_end(self, args, state, control, **kwargs):
        """Lets the model load the names of its checkpoints."""
        load_from_disk_names(kwargs["model"])

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuses to go on from a checkpoint of which a tensor is missing."""
        hook, resumed = restore_hook(kwargs["model"]), state.global_step > 0
        if hook is not None:
            hook.finish(whole=resumed)
        elif load_from_disk_names(kwargs["model"]) is not None and resumed:
            raise RestoringError(
                "resuming with model_init does not load the experts: give the Trainer a model instead"
            )
        for handle in balances_of(kwargs["model"]):
            handle.follow(kwargs["model"])

    def on_step_begin(self, args, state, control, **kwargs):
        """Scales the router losses of one micro-batch, and drops the counts of an abandoned step."""
        forget_counts(kwargs["model"])
        loader = kwargs["train_dataloader"]
        batches = len(loader) if has_length(loader) else None
        scale = 1 / micro_batches(args.gradient_accumulation_steps, state.global_step, batches)
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        if scaler is not None:
            scale *= scaler.get_scale()
        _set_router_loss_scale(kwargs["model"], scale)
        for handle in balances_of(kwargs["model"]):
            handle.forget()
            handle.scale = scale
            handle.token_scale = _ranks_of_tokens(args, kwargs["model"]) * (
                1 if scaler is None else scaler.get_scale()
            )

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Steps the controllers and the selection biases of transformers' models."""
        skipped, handles = getattr(kwargs["optimizer"], "step_was_skipped", False), balances_of(kwargs["model"])
        if skipped:
            forget_counts(kwargs["model"])
        update_routers(kwargs["model"])
        for handle in handles:
            if skipped:
                handle.forget()
            handle.step()

    def on_train_end(self, args, state, control, **kwargs):
        """Sets the scale to 1 again, and refuses a best checkpoint of which a tensor is missing."""
        _set_router_loss_scale(kwargs["model"], 1.0)
        for handle in balances_of(kwargs["model"]):
            handle.scale = handle.token_scale = 1.0
        hook = restore_hook(kwargs["model"])
        if hook is not None:
            hook.finish(whole=args.load_best_model_at_end and state.best_model_checkpoint is not None)


# transformers' annotation is narrower than its use: `Trainer` takes every TrainerCallback class in this list
_DEFAULTS: list[type[TrainerCallback]] = DEFAULT_CALLBACKS  # pyrefly: ignore[bad-assignment]


def is_enabled() -> bool:
    """Returns whether each new `Trainer` gets a [`MoECallback`]."""
    return MoECallback in _DEFAULTS


def enable() -> None:
    """Gives each `Trainer` that is made from now on a [`MoECallback`]; a second call does nothing.

    Example:
        >>> import modeling_moe.training
        >>> modeling_moe.training.enable()
    """
    if not is_enabled():
        _DEFAULTS.append(MoECallback)


def disable() -> None:
    """Gives a `Trainer` that is made from now on no callback of this package; existing ones keep theirs."""
    if is_enabled():
        _DEFAULTS.remove(MoECallback)


class CastOnceCallback(TrainerCallback):
    """Casts experts in fp32 to the dtype of autocast once per optimizer step, for all its micro-batches, on a GPU.

    The callback opens [`~modeling_moe.dispatch.backends.triton.casting.cast_once`], whose documentation gives the cost
    in memory, and closes it before the optimizer step. Do not use it with CUDA graphs of torch.compile, FSDP or
    DeepSpeed, which move the matrices in each step.

    Example:
        >>> from modeling_moe.training import CastOnceCallback
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[CastOnceCallback()])
    """

    def __init__(self):
        self._step = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts to keep copies, after dropping those of a step that an exception has cut short."""
        self.close()
        self._step.enter_context(cast_once())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Drops the copies."""
        self.close()

    def on_train_end(self, args, state, control, **kwargs):
        """Drops the copies."""
        self.close()

    def close(self) -> None:
        """Drops the copies; call it when an exception ends training, since `Trainer` then calls no callback."""
        self._step.close()
