# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds what a fine-tuning logs and shows: the loss at checkpoints, the routing, and the progress bar."""

import logging
from collections.abc import Iterable

from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..monitoring import RoutingCallback, experts_modules
from .resume_state import read_trainer_state


logger = logging.getLogger(__name__)


class ScheduleCallback(TrainerCallback):
    """Warns if a resumed run follows another learning-rate schedule than the run before."""

    def __init__(self, checkpoint: str):
        self._before = read_trainer_state(checkpoint)

    def on_train_begin(self, args, state, control, **kwargs):
        """Compares the last steps of both runs."""
        constant = str(args.lr_scheduler_type) in ("constant", "SchedulerType.CONSTANT", "constant_with_warmup")
        if state.max_steps != self._before.max_steps and not constant and state.is_world_process_zero:
            logger.warning(
                f"The resumed run was planned to end at step {self._before.max_steps}, and this run ends at "
                f"{state.max_steps}: the learning rate follows another schedule, and the result differs from that of an "
                "uninterrupted run."
            )


class LogAtCheckpoints(TrainerCallback):
    """Logs the loss whenever a checkpoint is saved, since a checkpoint holds logged losses only."""

    def on_step_end(self, args, state, control, **kwargs):
        """Logs before the checkpoint is saved."""
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, args, state, control, **kwargs):
        """Logs before the checkpoint is saved."""
        control.should_log = control.should_log or control.should_save


class ProgressLine(ProgressCallback):
    """Shows the last loss and the last MaxVio beside the progress bar, and writes each log without the other figures of
    the routing."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Updates the bar."""
        logs = logs or {}
        shown = {"loss": logs.get("loss"), "MaxVio": logs.get("routing/max_violation")}
        shown = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)
        hidden = [name for name in logs if name.startswith("routing/") and name != "routing/max_violation"]
        written = {name: value for name, value in logs.items() if name not in hidden}
        super().on_log(args, state, control, written, **kwargs)


def routing_callbacks(
    args: TrainingArguments, model: nn.Module, callbacks: Iterable[TrainerCallback]
) -> list[RoutingCallback]:
    """Returns the callback that logs the routing of a fine-tuning; none if it is off, of no use, or among `callbacks`.

    Args:
        args: the training; its `routing_steps`, if it has one, are the steps between two readings, 0 for none, and None for
            one with each log.
        model: the model to train.
        callbacks: the caller's callbacks.
    """
    steps = getattr(args, "routing_steps", None)
    given = any(isinstance(callback, RoutingCallback) for callback in callbacks)
    unasked = steps is None and (args.logging_strategy == "no" or not experts_modules(model))
    if steps == 0 or given or unasked:
        return []
    return [RoutingCallback(steps)]


def show_progress_line(trainer: Trainer) -> None:
    """Replaces the progress bar of a Trainer by a [`ProgressLine`], if it has one in a terminal."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine())


def detach(trainer: Trainer) -> None:
    """Removes the hooks that a RoutingCallback has on the model, also after an exception."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RoutingCallback):
            callback.close()
