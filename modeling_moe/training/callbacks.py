# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a `Trainer` has to do for a Mixture of Experts beyond computing the loss, done by a callback that every `Trainer`
has once this module is imported."""

from contextlib import ExitStack

from torch import nn
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_utils import has_length

from ..dispatch.backends.triton.casting import cast_once
from ..router_balancing import forget_counts, update_routers
from .restoring import RestoringError, load_from_disk_names, restore_hook


def _set_router_loss_scale(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if "router_loss_scale" in vars(module):
            vars(module)["router_loss_scale"] = scale


def micro_batches(accumulation_steps: int, step: int, batches: int | None) -> int:
    """Micro-batches of a `Trainer`'s optimizer step: an epoch's last step takes what is left.

    Args:
        accumulation_steps: micro-batches of any other step.
        step: number of optimizer steps before, over all epochs.
        batches: micro-batches of an epoch; None if nobody knows.
    """
    if not batches:
        return accumulation_steps
    steps_in_epoch = -(-batches // accumulation_steps)
    left = batches - (steps_in_epoch - 1) * accumulation_steps
    return left if step % steps_in_epoch == steps_in_epoch - 1 else accumulation_steps


class MoECallback(TrainerCallback):
    """Balances the experts' load without gradient, and gives router losses that attach themselves the trainer's factors.

    After each optimizer step it steps the routers' controllers, which move selection biases, thresholds and the like
    ([`~modeling_moe.router_balancing.update_routers`]).
    Router losses attach themselves where the trainer computes the loss without our head (label smoothing, TRL). What a
    trainer multiplies its own loss by does not reach them, so it is set before each step: 1 over the step's number of
    micro-batches, and the scale of fp16 training (not DeepSpeed's own). So a step's gradient is the mean over its
    sequences, however micro-batches of equally many sequences split it.
    Both reach through PEFT, DDP and FSDP wrappers, and do nothing to a model without experts.
    The model's `load_state_dict` takes the names that its checkpoints have on disk ([`~modeling_moe.training.restoring`]), so
    that resuming and `load_best_model_at_end` give transformers' own models their experts and routers, from one file or
    shards; what a checkpoint lacks is an error.

    `import modeling_moe.training` gives one to each `Trainer` made after, TRL's included. To pass one by hand changes
    nothing.

    Example:
        >>> import modeling_moe.training
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset)
    """

    def on_init_end(self, args, state, control, **kwargs):
        """Lets the model load what its checkpoints hold."""
        load_from_disk_names(kwargs["model"])

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuses to go on from a checkpoint that was not loaded whole."""
        hook, resumed = restore_hook(kwargs["model"]), state.global_step > 0
        if hook is not None:
            hook.finish(whole=resumed)
        elif load_from_disk_names(kwargs["model"]) is not None and resumed:
            raise RestoringError(
                "resuming with model_init does not load the experts: give the Trainer a model instead"
            )

    def on_step_begin(self, args, state, control, **kwargs):
        """Scales the router losses of one micro-batch, and forgets what an abandoned step has counted."""
        forget_counts(kwargs["model"])
        loader = kwargs["train_dataloader"]
        batches = len(loader) if has_length(loader) else None
        scale = 1 / micro_batches(args.gradient_accumulation_steps, state.global_step, batches)
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        if scaler is not None:
            scale *= scaler.get_scale()
        _set_router_loss_scale(kwargs["model"], scale)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Steps the controllers."""
        update_routers(kwargs["model"])

    def on_train_end(self, args, state, control, **kwargs):
        """Takes the scale back, and refuses a best checkpoint that was not loaded whole."""
        _set_router_loss_scale(kwargs["model"], 1.0)
        hook = restore_hook(kwargs["model"])
        if hook is not None:
            hook.finish(whole=args.load_best_model_at_end and state.best_model_checkpoint is not None)


class DefaultMoECallback(MoECallback):
    """The one that every `Trainer` has; `Trainer.remove_callback` takes it away."""


class CastOnceCallback(TrainerCallback):
    """Casts experts in fp32 to the dtype of autocast once per optimizer step, for all its micro-batches, on a GPU.

    It opens [`~modeling_moe.dispatch.backends.triton.casting.cast_once`], which says what that costs, and closes it before the optimizer
    steps. Neither torch.compile's CUDA graphs nor FSDP or DeepSpeed should have it: their matrices live elsewhere in each step.

    Example:
        >>> from modeling_moe.training.callbacks import CastOnceCallback
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[CastOnceCallback()])
    """

    def __init__(self):
        self._step = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        """Opens it, and closes that of a step which an exception cut short."""
        self.close()
        self._step.enter_context(cast_once())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Closes it."""
        self.close()

    def on_train_end(self, args, state, control, **kwargs):
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Drops the copies, where training ends by an exception, of which a `Trainer` tells no callback."""
        self._step.close()


if DefaultMoECallback not in DEFAULT_CALLBACKS:
    DEFAULT_CALLBACKS.append(DefaultMoECallback)
