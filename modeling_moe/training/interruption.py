# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module ends training with a complete checkpoint after Ctrl-C, or after the SIGTERM of a cluster's scheduler."""

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
# torchrun passes Ctrl-C on to processes that the terminal has already signalled, and sends SIGTERM too
ECHO_SECONDS = 10.0


class SaveOnInterrupt(TrainerCallback):
    """Completes the optimizer step after a first signal, saves a checkpoint and raises [`Interrupted`] on all
    processes.

    A second Ctrl-C stops at once. Signals are handled only inside [`listening`][SaveOnInterrupt.listening].
    """

    def __init__(self):
        self._asked: float | None = None
        self._stopping = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block, in the main thread, which alone receives signals in Python."""
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
            return  # a forked data-loading worker, which this process ends
        if self._asked is None:
            self._asked = time.monotonic()
            if PartialState().is_local_main_process:
                # the signal may have interrupted `print`, which cannot be entered again
                os.write(2, b"\nstopping after this step, which is saved first; a second Ctrl-C stops at once\n")
        elif number == signal.SIGINT and not self._is_echo():
            raise KeyboardInterrupt

    def _is_echo(self) -> bool:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        return launched and self._asked is not None and time.monotonic() - self._asked < ECHO_SECONDS

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint if a process has received a signal."""
        asked = torch.tensor(float(self._asked is not None), device=args.device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        self._stopping = bool(asked)
        control.should_save = control.should_save or self._stopping

    def on_save(self, args, state, control, **kwargs):
        """Raises [`Interrupted`] when all processes have written their part."""
        if self._stopping:
            PartialState().wait_for_everyone()
            raise Interrupted(
                f"step {state.global_step} is saved: to go on, add --resume_from_checkpoint true to the flags"
            )
