# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Many short runs one after another or in several processes; those that a file holds are not run again."""

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
    """JSON lines, one for each run that is finished, with the settings that all of them must share.

    Args:
        path: the file; None keeps nothing.
        settings: all that a run depends on beside what tells it from the others, in JSON's types.
    """

    def __init__(self, path: str | None, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._settings = json.loads(json.dumps(settings))

    def read(self, make: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """The runs in the file.

        Args:
            make: a run of its entries.

        Raises:
            UserError: if it holds runs with other settings, or something else.
        """
        if self._path is None or not self._path.exists():
            return []
        runs = []
        for number, line in enumerate(self._path.read_text("utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
                run, settings = make(entry["run"]), entry["settings"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"runs_file {self._path} holds no run in line {number}: remove the line") from error
            if settings != self._settings:
                raise UserError(f"runs_file {self._path} holds runs with other arguments: name another file")
            runs.append(run)
        return runs

    def add(self, run: dict[str, Any]) -> None:
        """Appends a run."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": self._settings, "run": run}) + "\n")

    def how_to_go_on(self) -> str:
        """What to say when the user stops."""
        if self._path is None:
            return "nothing was kept, name a runs_file to keep the runs that are finished"
        return f"the same command goes on, {self._path} keeps the runs that are finished"


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_all(
    jobs: Sequence[tuple], function: Callable, workers: int, finish: Callable[[Any], None], file: RunsFile, desc: str
) -> None:
    """Calls `function(*job)` for each job, and `finish` with each result as soon as it is there.

    Args:
        jobs: arguments of each run.
        function: a run; pickled, if there are several workers.
        workers: processes, no more than there are jobs; 1 runs in this one.
        finish: keeps a result.
        file: what it says to a user who stops.
        desc: of the progress bar.

    Raises:
        Interrupted: on Ctrl-C, when all workers have ended.
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
        # a run takes minutes, and nothing is asked of it any more
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown()
