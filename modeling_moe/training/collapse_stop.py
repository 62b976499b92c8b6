# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module ends a training whose routing has collapsed, and says in which layer.

# E experts, K experts per token
"""

import math
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..monitoring import LayerFigures, RoutingWatch, UnreachableRouting
from ..utils.errors import UserError


logger = logging.get_logger(__name__)


class CollapseError(UserError):
    """The routing has collapsed; the message names the step and the layer."""


def load_entropy(load: torch.Tensor, top_k: int) -> float:
    """Returns how evenly the load is spread, (H - log K) / (log E - log K): 1 in balance, 0 if K experts get all tokens.

    H is the entropy of the experts' shares in all assignments. Divided by log E alone, as is usual, it would be log K / log E
    in full collapse.

    Args:
        load: (E,) tokens of each expert.
        top_k: number K of experts per token.

    Returns:
        A number; 1 if K is E, or without any load.
    """
    experts, total = len(load), load.sum().item()
    if top_k >= experts or not total:
        return 1.0
    entropy = torch.special.entr(load.double() / total).sum().item()
    return (entropy - math.log(top_k)) / (math.log(experts) - math.log(top_k))


class CollapseStop(TrainerCallback, ExportableState):
    """Ends the training when a layer of any MoE of transformers has been collapsed in several readings in a row.

    A reading is the load of one optimizer step, of all micro-batches and processes. The step is observed alone: the other steps
    run without hooks. A layer counts as collapsed if [`load_entropy`] is below `min_entropy`, or MaxVio (the largest load over
    the mean load, less 1) above `max_violation`. Then the callback warns, saves a checkpoint and stops. Checkpoints hold the
    numbers of readings in a row, so that a resumed run stops at the step at which an uninterrupted one would.

    Args:
        every: optimizer steps between two readings.
        patience: collapsed readings in a row that end the training.
        min_entropy: least spread of the load, in [0, 1].
        max_violation: largest MaxVio; None for no limit.

    Attributes:
        reason: why the training ended; None if it was not ended by this callback.

    Raises:
        UserError: if a number is out of range; and when training begins, if the model's routing cannot be seen, or the Trainer
            has another CollapseStop, because a checkpoint has a place for the readings of one.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[CollapseStop(every=50)])
    """

    def __init__(
        self, every: int = 50, patience: int = 3, min_entropy: float = 0.25, max_violation: float | None = None
    ):
        for name, value in {"collapse_steps": every, "collapse_patience": patience}.items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if not 0 <= min_entropy <= 1:
            raise UserError(f"collapse_entropy is {min_entropy}: it must be from 0 to 1")
        if max_violation is not None and not max_violation > 0:
            raise UserError(f"collapse_violation is {max_violation}: it must be above 0")
        self.every, self.patience, self.min_entropy, self.max_violation = every, patience, min_entropy, max_violation
        self.collapsed: dict[str, int] = {}
        self.reason: str | None = None
        self._watch: RoutingWatch | None = None

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        names = ("every", "patience", "min_entropy", "max_violation")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"collapsed": self.collapsed}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes the readings in a row from the checkpoint, and checks that the routing can be seen."""
        self.close()
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        # transformers makes a list of two callbacks' states, but not when it resumes from a checkpoint of one
        if isinstance(kept, list) or vars(state).setdefault("_collapse_stop", self) is not self:
            raise UserError("the Trainer has two CollapseStop callbacks: give it one, or omit collapse_steps")
        self.collapsed, self.reason = dict(kept["attributes"]["collapsed"]), None
        try:
            RoutingWatch(kwargs["model"], co_activation=False).detach()
        except UnreachableRouting as error:
            raise UserError(f"collapse_steps has no effect: {error}") from error

    def on_step_begin(self, args, state, control, **kwargs):
        """Observes the step if a reading is due after it."""
        self.close()
        if (state.global_step + 1) % self.every == 0:
            self._watch = RoutingWatch(kwargs["model"], co_activation=False, training_only=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Judges the step."""
        if self._watch is None:
            return
        figures = self._watch.read()
        self.close()
        signs = {layer.label: sign for layer in figures.layers if (sign := self._sign(layer)) is not None}
        self.collapsed = {label: self.collapsed.get(label, 0) + 1 for label in signs}
        over = [label for label, times in self.collapsed.items() if times >= self.patience]
        if over:
            self.reason = (
                f"step {state.global_step}: the routing of {', '.join(f'{x} ({signs[x]})' for x in over)} has collapsed in "
                f"{self.patience} readings in a row: raise router_aux_loss_coef or the step size of the selection bias, lower "
                "the learning rate of the routers, and go on from an earlier checkpoint"
            )
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(self.reason)

    def _sign(self, layer: LayerFigures) -> str | None:
        """Returns the figure by which a layer counts as collapsed, or None."""
        if not layer.tokens:
            return None
        entropy = load_entropy(layer.load, layer.top_k)
        if entropy < self.min_entropy:
            return f"load entropy {entropy:.2f}, below {self.min_entropy:g}"
        if self.max_violation is not None and layer.max_violation > self.max_violation:
            return f"MaxVio {layer.max_violation:.2f}, above {self.max_violation:g}"
        return None

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches from the model."""
        self.close()

    def close(self) -> None:
        """Detaches from the model; call it when an exception ends training, since `Trainer` then calls no callback."""
        if self._watch is not None:
            self._watch.detach()
            self._watch = None
