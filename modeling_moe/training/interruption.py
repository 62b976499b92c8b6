# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Ctrl-C, and the signal that a scheduler sends before it takes a machine away, end training with a whole checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import PartialState
from torch import distributed
from transformers import TrainerCallback

from ..utils.errors import Interrupted


SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes a terminal's Ctrl-C, which has reached its processes already, on to them, and SIGTERM besides
ECHO_SECONDS = 10.0


class SaveOnInterrupt(TrainerCallback):
    """After the first signal it lets the optimizer step end, saves a checkpoint and raises [`Interrupted`] on all ranks.

    A second Ctrl-C stops at once. It listens within [`listening`][SaveOnInterrupt.listening] alone.
    """

    def __init__(self):
        self._asked: float | None = None
        self._stopping = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over while the block runs, in the main thread, to which alone Python gives them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data, which this process ends
        if self._asked is None:
            self._asked = time.monotonic()
            if PartialState().is_local_main_process:
                # `print` must not be called again while it is interrupted
                os.write(2, b"\nstopping: the step is finished and saved first; Ctrl-C once more stops at once\n")
        elif number == signal.SIGINT and not self._is_echo():
            raise KeyboardInterrupt

    def _is_echo(self) -> bool:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        return launched and self._asked is not None and time.monotonic() - self._asked < ECHO_SECONDS

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint if any rank was told to stop."""
        asked = torch.tensor(float(self._asked is not None), device=args.device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        self._stopping = bool(asked)
        control.should_save = control.should_save or self._stopping

    def on_save(self, args, state, control, **kwargs):
        """Stops, when all ranks have written their part."""
        if self._stopping:
            PartialState().wait_for_everyone()
            raise Interrupted(
                f"step {state.global_step} is saved, go on with the same flags and --resume_from_checkpoint true"
            )
