# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module shows a progress bar over bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def byte_progress(description: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows bytes done, speed and remaining time on stderr; yields a function that adds a number of finished bytes.

    Args:
        description: text before the bar.
        total: number of bytes in all; nothing is shown if it is 0.
        show: whether to show the bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not (show and total)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
