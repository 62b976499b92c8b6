# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives routing replay to a `Trainer` in one line."""

import math

from transformers import TrainerCallback

from .recording import RoutingRecorder
from .replaying import RoutingReplay
from .store import RoutingStore


class RoutingReplayCallback(TrainerCallback):
    """Records the experts of each text that the trained model generates, and trains on the text with these experts.

    It serves TRL's `GRPOTrainer` and `RLOOTrainer`, whose rollouts come from the model's own `generate`. `DPOTrainer` and
    `KTOTrainer` generate nothing: give them a store with the texts of their dataset, recorded by
    [`~modeling_moe.replay.record_routing`] or taken from vLLM.

    Each log gets `replay/coverage` and `replay/flipped`, see [`~modeling_moe.replay.ReplayFigures`], unless nothing was
    replayed since the last one. The trackers of `report_to` are called before this callback, so that `trainer_state.json` and
    the callbacks after this one have the figures, and the trackers do not.

    Args:
        store: recorded texts; by default a new store that the generations of the training fill.

    Example:
        >>> from modeling_moe.replay import RoutingReplayCallback
        >>> trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, callbacks=[RoutingReplayCallback()])
    """

    def __init__(self, store: RoutingStore | None = None):
        self.store = RoutingStore() if store is None else store
        self._recorder: RoutingRecorder | None = None
        self._replay: RoutingReplay | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Attaches to the model."""
        self.close()
        self._recorder = RoutingRecorder(kwargs["model"], self.store, generations_only=True)
        self._replay = RoutingReplay(kwargs["model"], self.store, self._recorder)

    def on_log(self, args, state, control, **kwargs):
        """Adds the figures."""
        if self._replay is not None:
            figures = self._replay.figures()._asdict()
            named = {f"replay/{name}": value for name, value in figures.items() if not math.isnan(value)}
            kwargs["logs"].update(named)
            # the Trainer has copied the logs into its history before
            state.log_history[-1].update(named)

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches from the model."""
        self.close()

    def close(self) -> None:
        """Detaches from the model; call it when an exception ends training, since `Trainer` then calls no callback."""
        for handle in (self._recorder, self._replay):
            if handle is not None:
                handle.remove()
        self._recorder = self._replay = None
