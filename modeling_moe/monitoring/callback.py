# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module logs the routing of any Mixture of Experts while a `Trainer` trains it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

from .figures_callback import FiguresCallback
from .layers import UnreachableRouting, sparse_layers
from .loss_meter import RouterLossMeter
from .ranks import is_distributed, sum_over_ranks
from .router_gradients import RouterGradientMeter
from .warnings import Reading, RoutingWarnings
from .watching import RoutingWatch


logger = logging.get_logger(__name__)

PREFIX = "routing"


class RoutingCallback(FiguresCallback):
    """Logs the routing of any MoE in training: to every tracker of `report_to`, and to `trainer_state.json`.

    With each log of the `Trainer` the callback adds, for the training passes since the last one and over all processes:

    - the figures of [`~modeling_moe.watch`], of each sparse layer (`routing/layer_03/max_violation`) and of the model
      (`routing/max_violation`);
    - `router_grad_norm`, the norm of the gradient that the optimizer got for the routers, after clipping;
    - `routing/balance_loss`, `routing/z_loss` and so on: the router losses before their coefficients, averaged over
      layers and passes. Of a model of transformers with `output_router_logits=True` it is `routing/aux_loss`.

    It warns once, with the remedy, of collapse, of dead experts, of many dropped assignments, of a router without gradient,
    and of a selection bias that never moves. It never ends a training: a dense model, or an error in reading the routing, gets
    one warning, and the training goes on without figures.

    Use a RoutingCallback for one Trainer; for a Trainer that exists already there is [`RoutingCallback.add_to`]. The trackers
    and all callbacks that come before the RoutingCallback get the figures of all layers; later ones, among them the progress
    bar and the printer, get those of the model only, which a person can read.

    A second RoutingCallback in the same `Trainer` has no effect.

    Args:
        every: optimizer steps between two readings; each makes the `Trainer` log. By default the figures come with each log
            that the `Trainer` makes (`logging_steps`).

    Raises:
        ValueError: if `every` is below 1; and by the `Trainer`, if the callback comes too late to reach the trackers.

    Example:
        >>> from modeling_moe.monitoring import RoutingCallback
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[RoutingCallback()])
        >>> trainer.train()
    """

    def __init__(self, every: int | None = None):
        if every is not None and every < 1:
            raise ValueError(f"every is {every}: it must be at least 1 optimizer step")
        super().__init__()
        self.every = every
        self._is_second = False
        self._session: RoutingSession | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback to a Trainer that exists, before its trackers; without effect if the Trainer has one."""
        if any(isinstance(callback, RoutingCallback) for callback in trainer.callback_handler.callbacks):
            self._stop_waiting()
        else:
            super().add_to(trainer)

    def on_init_end(self, args, state, control, **kwargs):
        """Looks for the callback that stands before the trackers."""
        super().on_init_end(args, state, control, **kwargs)
        assert self._front is not None
        self._is_second = next(one for one in self._front.callbacks if isinstance(one, RoutingCallback)) is not self

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts to watch the model."""
        super().on_train_begin(args, state, control, **kwargs)
        if self._is_second:
            return
        self.close()
        if self.every is None and args.logging_strategy == "no":
            _warn(state, "RoutingCallback logs nothing, since logging_strategy is no: set RoutingCallback(every=...)")
            return
        with self._keeps_training(state):
            self._session = RoutingSession(kwargs["model"], state.global_step)

    @contextmanager
    def _keeps_training(self, state: TrainerState) -> Iterator[None]:
        """Turns an exception in the block into a warning, and detaches from the model."""
        try:
            yield
        except UnreachableRouting as error:
            _warn(state, str(error))
        except Exception as error:
            self.close()
            _warn(state, f"The training goes on, and its routing is logged no more: {_described(error)}")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Measures the routers' gradients."""
        if self._session is not None:
            with self._keeps_training(state):
                self._session.gradients.measure()

    def on_step_end(self, args, state, control, **kwargs):
        """Reads the figures if they are due, on all processes alike."""
        if self._session is None:
            return
        due = control.should_log if self.every is None else state.global_step % self.every == 0
        control.should_log = control.should_log or due
        if due or control.should_training_stop:
            with self._keeps_training(state):
                self._session.read(state.global_step)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Reads the figures if the Trainer logs once per epoch."""
        if self._session is not None and self.every is None and control.should_log:
            with self._keeps_training(state):
                self._session.read(state.global_step)

    def publish(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        """Returns the figures of the last reading for a log of training, and warns of them."""
        if self._session is None or not ("loss" in logs or "train_runtime" in logs):
            return {}
        figures = self._session.take_scalars()
        # as large as it was after clipping, like the routers' gradients
        whole = logs.get("grad_norm", 0.0)
        model_gradient = min(whole, args.max_grad_norm or math.inf) if math.isfinite(whole) else math.inf
        with self._keeps_training(state):
            for message in self._session.take_warnings(model_gradient):
                _warn(state, message)
        return figures

    def on_log(self, args, state, control, **kwargs):
        """Leaves the model's figures to the callbacks that come later, and removes those of single layers."""
        logs = kwargs["logs"]
        for name in [name for name in logs if name.startswith(f"{PREFIX}/") and name.count("/") > 1]:
            del logs[name]

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches from the model."""
        self.close()

    def close(self) -> None:
        """Detaches from the model; call it when an exception ends training, since `Trainer` then calls no callback."""
        if self._session is not None:
            self._session.close()
            self._session = None


class RoutingSession:
    """Measures a model from the beginning of a training to its end.

    Attributes:
        gradients: the meter of the routers' gradients.
    """

    def __init__(self, model: Any, step: int):
        layers = sparse_layers(model)
        self._failure: str | None = None
        self._watch = RoutingWatch(model, co_activation=False, training_only=True, on_failure=self._note)
        self._losses = RouterLossMeter(model, self._note)
        self.gradients = RouterGradientMeter(model, layers)
        self._warnings = RoutingWarnings.of(model, layers)
        self._read_at = step
        self._scalars: dict[str, float] = {}
        self._reading: Reading | None = None

    def _note(self, error: Exception) -> None:
        """Keeps the first exception of a pass until the next reading, where the processes learn of it together."""
        self._failure = self._failure or _described(error)

    def read(self, step: int) -> None:
        """Reads all figures since the last reading, which the processes sum; a second call in a step does nothing.

        Raises:
            RuntimeError: if a pass of any process could not be read.
        """
        if step == self._read_at:
            return
        self._read_at = step
        failures = sum_over_ranks({}, self._failure, True).facts if is_distributed() else [self._failure]
        for failure in failures:
            if failure is not None:
                raise RuntimeError(failure)
        figures = self._watch.read(reset=True)
        norms, losses = self.gradients.read(), self._losses.read()
        self._scalars = figures.scalars(PREFIX)
        labels = {layer.name: layer.label for layer in figures.layers}
        self._scalars |= {f"{PREFIX}/{labels[name]}/router_grad_norm": norm for name, norm in norms.items()}
        if norms:
            self._scalars[f"{PREFIX}/router_grad_norm"] = math.hypot(*norms.values())
        self._scalars |= {f"{PREFIX}/{name}_loss": value for name, value in losses.items()}
        self._reading = Reading(figures.layers, norms)

    def take_scalars(self) -> dict[str, float]:
        """Returns the figures of the last reading by key, and forgets them."""
        scalars, self._scalars = self._scalars, {}
        return scalars

    def take_warnings(self, model_gradient: float) -> list[str]:
        """Returns the new warnings of the last reading; `model_gradient` is that of a [`Reading`]."""
        reading, self._reading = self._reading, None
        return [] if reading is None else self._warnings.judge(reading._replace(model_gradient=model_gradient))

    def close(self) -> None:
        """Removes all hooks from the model."""
        self._watch.detach()
        self._losses.close()


def _described(error: Exception) -> str:
    """Returns the text of an exception, with the name of its class where the text may not be a sentence."""
    return str(error) if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: {error}"


def _warn(state: TrainerState, message: str) -> None:
    if state.is_world_process_zero:
        logger.warning(message)
