# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lets callbacks of a `Trainer` add figures to its logs before the trackers of `report_to` get the logs.

`Trainer` calls the trackers before the callbacks that it is given. A small callback therefore stands before the trackers, and
asks each [`FiguresCallback`] of the `Trainer` for its figures.
"""

from typing import Any
from weakref import WeakSet, finalize

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS, DEFAULT_PROGRESS_CALLBACK


class BeforeTrackers(TrainerCallback):
    """This callback stands before the trackers of a `Trainer`, and adds the figures of other callbacks to each log.

    Attributes:
        callbacks: those whose figures are added, in the order in which the `Trainer` calls them.
    """

    def __init__(self) -> None:
        self.state: TrainerState | None = None
        self.callbacks: list[FiguresCallback] = []
        _FRONTS.add(self)

    def on_init_end(self, args, state, control, **kwargs):
        """Notes the Trainer's state, by which a FiguresCallback recognises the BeforeTrackers of a Trainer."""
        self.state = state

    def on_log(self, args, state, control, **kwargs):
        """Adds the figures to the log, and to the entry that `log_history` has of the log."""
        logs = kwargs["logs"]
        for callback in self.callbacks:
            figures = callback.publish(args, state, logs)
            logs.update(figures)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(figures)


_FRONTS: "WeakSet[BeforeTrackers]" = WeakSet()
# callbacks that wait for the Trainer to which they are passed
_WAITING: "WeakSet[FiguresCallback]" = WeakSet()
# transformers' annotation is narrower than its use: `Trainer` takes every TrainerCallback class in this list
_DEFAULTS: list[type[TrainerCallback]] = DEFAULT_CALLBACKS  # pyrefly: ignore[bad-assignment]


def _update_defaults() -> None:
    """Gives new Trainers a [`BeforeTrackers`] while a FiguresCallback waits for its Trainer, and not otherwise."""
    if _WAITING and BeforeTrackers not in _DEFAULTS:
        _DEFAULTS.append(BeforeTrackers)
    elif not _WAITING and BeforeTrackers in _DEFAULTS:
        _DEFAULTS.remove(BeforeTrackers)


class FiguresCallback(TrainerCallback):
    """Base class of callbacks that add figures to the logs of a `Trainer`, for every tracker of `report_to` to see.

    A subclass implements [`FiguresCallback.publish`], and calls the methods of this class from those that it overrides.

    A new callback waits for its Trainer: until that exists, each new `Trainer` gets a [`BeforeTrackers`], which does nothing
    in other Trainers. Use a callback for one Trainer; for a Trainer that exists already there is
    [`FiguresCallback.add_to`].

    Raises:
        ValueError: by the `Trainer`, if the callback comes too late to reach the trackers.
    """

    def __init__(self) -> None:
        self._front: BeforeTrackers | None = None
        # before the callback waits: Python runs what ends with an object in the reverse order
        ending: Any = finalize(self, _update_defaults)
        ending.atexit = False
        _WAITING.add(self)
        _update_defaults()

    def publish(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        """Returns the figures to add to a log; all processes call it.

        Args:
            args, state: those of the Trainer.
            logs: the log so far.
        """
        raise NotImplementedError

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback to a Trainer that exists, before the Trainer's trackers."""
        callbacks = trainer.callback_handler.callbacks
        front = next((callback for callback in callbacks if isinstance(callback, BeforeTrackers)), None)
        if front is None:
            front = BeforeTrackers()
            callbacks.insert(0, front)
        self._join(front)
        printers = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)
        place = next((i for i, callback in enumerate(callbacks) if isinstance(callback, printers)), len(callbacks))
        callbacks.insert(place, self)
        self._stop_waiting()

    def _join(self, front: BeforeTrackers) -> None:
        self._front = front
        front.callbacks.append(self)

    def _stop_waiting(self) -> None:
        _WAITING.discard(self)
        _update_defaults()

    def on_init_end(self, args, state, control, **kwargs):
        """Looks for the callback that stands before the trackers."""
        front = next((front for front in _FRONTS if front.state is state), None)
        self._stop_waiting()
        if front is None or self._front is not None:
            raise ValueError(self._late())
        self._join(front)

    def on_train_begin(self, args, state, control, **kwargs):
        """Checks that the trackers will get the figures."""
        self._stop_waiting()
        if self._front is None:
            raise ValueError(self._late())

    def _late(self) -> str:
        name = type(self).__name__
        return (
            f"{name} comes after the trackers, which would not get its figures: pass callbacks=[{name}()] with a new {name} "
            f"made before the Trainer, or call {name}().add_to(trainer)."
        )
