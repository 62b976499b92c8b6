# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module executes many short runs, one after another or in several processes; finished runs are kept in a file."""

import json
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from modeling_moe.utils.errors import Interrupted, UserError


class RunsFile:
    """Stores finished runs as JSON Lines, each with the settings that all runs of a file share.

    Args:
        path: path of the file; None stores nothing.
        settings: everything that all runs depend on, in JSON's types.
    """

    def __init__(self, path: str | None, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._settings = json.loads(json.dumps(settings))

    def read(self, make: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """Reads the runs in the file.

        Args:
            make: function that makes a run from the stored dictionary.

        Raises:
            UserError: if a line is not a run, or its settings are different.
        """
        if self._path is None or not self._path.exists():
            return []
        runs = []
        for number, line in enumerate(self._path.read_text("utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
                run, settings = make(entry["run"]), entry["settings"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"runs_file {self._path} does not hold a run in line {number}: remove the line"
                ) from error
            if settings != self._settings:
                raise UserError(f"runs_file {self._path} holds runs with other arguments: name another file")
            runs.append(run)
        return runs

    def add(self, run: dict[str, Any]) -> None:
        """Appends a run to the file."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": self._settings, "run": run}) + "\n")

    def how_to_go_on(self) -> str:
        """Returns a sentence that says how to continue after Ctrl-C."""
        if self._path is None:
            return "nothing was kept; give a runs_file to keep finished runs"
        return f"repeat the command to continue; finished runs are in {self._path}"


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_all(
    jobs: Sequence[tuple], function: Callable, workers: int, finish: Callable[[Any], None], file: RunsFile, desc: str
) -> None:
    """Calls `function(*job)` for each job, and `finish` with each result as soon as it is there.

    Args:
        jobs: the arguments of each run.
        function: executes a run; it is pickled if there are several workers.
        workers: number of processes, at most one for each job; with 1 the runs are executed in this process.
        finish: stores a result.
        file: file of the runs; it provides the message after Ctrl-C.
        desc: label of the progress bar.

    Raises:
        Interrupted: on Ctrl-C, after all workers have ended.
    """
    try:
        if workers == 1 or len(jobs) < 2:
            for job in tqdm(jobs, desc=desc):
                finish(function(*job))
            return
        _in_processes(jobs, function, min(workers, len(jobs)), finish, desc)
    except KeyboardInterrupt as stop:
        raise Interrupted(file.how_to_go_on()) from stop


def _in_processes(
    jobs: Sequence[tuple], function: Callable, workers: int, finish: Callable[[Any], None], desc: str
) -> None:
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_leave_ctrl_c_to_the_parent)
    try:
        running = [pool.submit(function, *job) for job in jobs]
        for future in tqdm(as_completed(running), desc=desc, total=len(running)):
            finish(future.result())
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        # a run takes minutes, and its result is not needed any more
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown()
