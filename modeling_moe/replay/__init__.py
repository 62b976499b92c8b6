# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package records which experts the tokens of a text chose, and makes a later training pass use those experts again.

In reinforcement learning one engine writes the text and another pass trains on it. Small differences of the two, such as
bf16 against fp32, let some tokens choose other experts, and the ratio of the two probabilities of such a token is then far
from 1. Routing replay (R3, arXiv:2510.11370) trains with the experts of the rollout; their weights come from the router as it
is now, so that the router still learns.

    trainer = GRPOTrainer(model=model, ..., callbacks=[RoutingReplayCallback()])

[`record_routing`] and [`replay_routing`] do the two halves in a loop of your own.
"""

from typing import TYPE_CHECKING, Any

from .recording import RoutingRecorder, record_routing
from .replaying import ReplayFigures, RoutingReplay, replay_routing
from .store import RoutingStore


if TYPE_CHECKING:
    from .callback import RoutingReplayCallback


__all__ = [
    "ReplayFigures",
    "RoutingRecorder",
    "RoutingReplay",
    "RoutingReplayCallback",
    "RoutingStore",
    "record_routing",
    "replay_routing",
]


def __getattr__(name: str) -> Any:
    # the callback imports transformers' Trainer, which takes seconds
    if name == "RoutingReplayCallback":
        from .callback import RoutingReplayCallback

        return RoutingReplayCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
