# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module logs the routing of any Mixture of Experts while a `Trainer` trains it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, finalize

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS, DEFAULT_PROGRESS_CALLBACK
from transformers.utils import logging

from .layers import UnreachableRouting, sparse_layers
from .loss_meter import RouterLossMeter
from .ranks import is_distributed, sum_over_ranks
from .router_gradients import RouterGradientMeter
from .warnings import Reading, RoutingWarnings
from .watching import RoutingWatch


logger = logging.get_logger(__name__)

PREFIX = "routing"
LATE = (
    "RoutingCallback comes after the trackers, which would not get its figures: pass callbacks=[RoutingCallback()] with a new "
    "RoutingCallback made before the Trainer, or call RoutingCallback().add_to(trainer)."
)


class BeforeTrackers(TrainerCallback):
    """This callback stands before the trackers of a `Trainer`, and lets a [`RoutingCallback`] add its figures to each log."""

    def __init__(self) -> None:
        self.state: TrainerState | None = None
        self.routing: RoutingCallback | None = None
        _FRONTS.add(self)

    def on_init_end(self, args, state, control, **kwargs):
        """Notes the Trainer's state, by which a RoutingCallback of this Trainer recognises it."""
        self.state = state

    def on_log(self, args, state, control, **kwargs):
        """Adds the figures."""
        if self.routing is not None:
            self.routing.publish(args, state, kwargs["logs"])


_FRONTS: "WeakSet[BeforeTrackers]" = WeakSet()
# RoutingCallbacks that wait for the Trainer to which they are passed
_WAITING: "WeakSet[RoutingCallback]" = WeakSet()
# transformers' annotation is narrower than its use: `Trainer` takes every TrainerCallback class in this list
_DEFAULTS: list[type[TrainerCallback]] = DEFAULT_CALLBACKS  # pyrefly: ignore[bad-assignment]


def _update_defaults() -> None:
    """Gives new Trainers a [`BeforeTrackers`] while a RoutingCallback waits for its Trainer, and not otherwise."""
    if _WAITING and BeforeTrackers not in _DEFAULTS:
        _DEFAULTS.append(BeforeTrackers)
    elif not _WAITING and BeforeTrackers in _DEFAULTS:
        _DEFAULTS.remove(BeforeTrackers)


class RoutingCallback(TrainerCallback):
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

    Order: `Trainer` calls the trackers of `report_to` before the callbacks that it is given, and they must see the figures.
    Therefore a new RoutingCallback waits for its Trainer: until that exists, each new `Trainer` gets a small callback before
    its trackers ([`BeforeTrackers`]), which does nothing in other Trainers. Use a RoutingCallback for one Trainer; for a
    Trainer that exists already there is [`RoutingCallback.add_to`]. The trackers and all callbacks that come before the
    RoutingCallback get the figures of all layers; later ones, among them the progress bar and the printer, get those of the
    model only, which a person can read.

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
        self.every = every
        self._front: BeforeTrackers | None = None
        self._is_second = False
        self._session: RoutingSession | None = None
        # before the callback waits: Python runs what ends with an object in the reverse order
        ending: Any = finalize(self, _update_defaults)
        ending.atexit = False
        _WAITING.add(self)
        _update_defaults()

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback to a Trainer that exists, before its trackers; without effect if the Trainer has one."""
        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(callback, RoutingCallback) for callback in callbacks):
            self._front = BeforeTrackers()
            self._front.routing = self
            callbacks.insert(0, self._front)
            printers = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)
            place = next((i for i, callback in enumerate(callbacks) if isinstance(callback, printers)), len(callbacks))
            callbacks.insert(place, self)
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        _WAITING.discard(self)
        _update_defaults()

    def on_init_end(self, args, state, control, **kwargs):
        """Looks for the callback that stands before the trackers."""
        front = next((front for front in _FRONTS if front.state is state), None)
        self._stop_waiting()
        if front is None or self._front is not None:
            raise ValueError(LATE)
        if front.routing is None:
            self._front, front.routing = front, self
        self._is_second = front.routing is not self

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts to watch the model."""
        if self._is_second:
            return
        self._stop_waiting()
        if self._front is None:
            raise ValueError(LATE)
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

    def publish(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        """Adds the figures of the last reading to a log of training, and to the entry that `log_history` has of it."""
        if self._session is None or not ("loss" in logs or "train_runtime" in logs):
            return
        figures = self._session.take_scalars()
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        # as large as it was after clipping, like the routers' gradients
        whole = logs.get("grad_norm", 0.0)
        model_gradient = min(whole, args.max_grad_norm or math.inf) if math.isfinite(whole) else math.inf
        with self._keeps_training(state):
            for message in self._session.take_warnings(model_gradient):
                _warn(state, message)

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
