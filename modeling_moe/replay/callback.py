# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives routing replay to a `Trainer` in one line."""

import math
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..monitoring import FiguresCallback
from .recording import RoutingRecorder
from .replaying import RoutingReplay
from .store import RoutingStore


logger = logging.get_logger(__name__)


class RoutingReplayCallback(FiguresCallback):
    """Records the experts of each text that the trained model generates, and trains on the text with these experts.

    It serves TRL's `GRPOTrainer` and `RLOOTrainer`, whose rollouts come from the model's own `generate`. `DPOTrainer` and
    `KTOTrainer` generate nothing: give them a store with the texts of their dataset, recorded by
    [`~modeling_moe.replay.record_routing`] or taken from vLLM.

    Each log of training gets `replay/coverage` and `replay/flipped`, see [`~modeling_moe.replay.ReplayFigures`], of all
    processes together and unless nothing was replayed since the last one. The trackers of `report_to` get them too.

    Args:
        store: recorded texts; by default a new store that the generations of the training fill.

    Raises:
        ValueError: by the `Trainer`, if the callback comes too late to reach the trackers: add it to a Trainer that exists by
            `add_to`.

    Example:
        >>> from modeling_moe.replay import RoutingReplayCallback
        >>> trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, callbacks=[RoutingReplayCallback()])
    """

    def __init__(self, store: RoutingStore | None = None):
        super().__init__()
        self.store = RoutingStore() if store is None else store
        self._recorder: RoutingRecorder | None = None
        self._replay: RoutingReplay | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Attaches to the model."""
        super().on_train_begin(args, state, control, **kwargs)
        self.close()
        self._recorder = RoutingRecorder(kwargs["model"], self.store, generations_only=True)
        self._replay = RoutingReplay(kwargs["model"], self.store, self._recorder)

    def publish(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        """Returns the figures since the last log of training, without those that are nan."""
        if self._replay is None or not ("loss" in logs or "train_runtime" in logs):
            return {}
        figures = self._replay.figures()._asdict()
        return {f"replay/{name}": value for name, value in figures.items() if not math.isnan(value)}

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches from the model, and warns if there was no text to replay."""
        self.close()
        if not len(self.store):
            logger.warning(
                "RoutingReplayCallback has replayed nothing: the trained model has generated no text in this training, so give "
                "the callback a store of recorded texts, RoutingReplayCallback(store)"
            )

    def close(self) -> None:
        """Detaches from the model; call it when an exception ends training, since `Trainer` then calls no callback."""
        for handle in (self._recorder, self._replay):
            if handle is not None:
                handle.remove()
        self._recorder = self._replay = None
