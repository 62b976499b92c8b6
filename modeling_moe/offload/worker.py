# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs the newest of several tasks in one thread, which ends with its owner and outlives no process."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn
from weakref import WeakSet


# a task does its work step by step, so that a newer task can take its place between two steps
Task = Iterator[None]

_WORKERS: "WeakSet[Worker]" = WeakSet()


class Worker:
    """A Worker runs tasks in one daemon thread, which starts with the first task.

    A new task replaces one that waits, and one that runs after the step at hand. A fork of the process waits until the step at
    hand is done, so that the child finds no lock held by a thread that the child does not have; in the child a new thread starts
    with the first task.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str):
        self._name = name
        self._changed = threading.Condition()
        self._step = threading.Lock()  # held while a step of a task runs
        self._waiting: Task | None = None
        self._submitted = 0
        self._running = self._closed = False
        self._thread: threading.Thread | None = None
        _watch_forks()
        _WORKERS.add(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a thread cannot be copied or pickled: give the copy a new Worker")

    def submit(self, task: Task) -> None:
        """Lets the thread run a task instead of all earlier ones; does nothing after [`Worker.close`]."""
        with self._changed:
            if self._closed:
                return
            self._waiting = task
            self._submitted += 1
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=_work, args=(self,), name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drop(self) -> None:
        """Drops the waiting task, and the running one after the step at hand."""
        with self._changed:
            self._waiting = None
            self._submitted += 1
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until no task waits or runs, at most `timeout` seconds; returns False if the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and not self._running, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Ends the thread after the step at hand, for which it waits at most `timeout` seconds."""
        with self._changed:
            self._closed, self._waiting = True, None
            self._submitted += 1
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def next_task(self) -> tuple[Task, Callable[[], bool]] | None:
        """Waits for a task and returns it, with a function that tells whether the task is still wanted; None after the end."""
        with self._changed:
            self._running = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            task, self._waiting = self._waiting, None
            if task is None:
                return None
            self._running, number = True, self._submitted
            return task, lambda: self._submitted == number

    def run_step(self, task: Task) -> bool:
        """Runs the next step of a task; returns False after the last one."""
        with self._step:
            return next(task, _END) is not _END

    def before_fork(self) -> None:
        """Waits for the step at hand, and holds the locks until the process has forked."""
        self._step.acquire()
        self._changed.acquire()

    def after_fork(self) -> None:
        """Frees the locks, in the parent."""
        self._changed.release()
        self._step.release()

    def after_fork_in_child(self) -> None:
        """Frees the locks in the child, where the task has ended with the thread."""
        self._running, self._waiting = False, None
        self.after_fork()


_END = object()


def _work(worker: Worker) -> None:
    """Runs tasks until the worker is closed; a task raises nothing."""
    while (found := worker.next_task()) is not None:
        task, wanted = found
        while wanted() and worker.run_step(task):
            pass
        del found, task, wanted  # the next wait must not keep alive what the task refers to


_forking: list[Worker] = []


def _before_fork() -> None:
    _forking[:] = _WORKERS
    for worker in _forking:
        worker.before_fork()


def _after_fork() -> None:
    while _forking:
        _forking.pop().after_fork()


def _after_fork_in_child() -> None:
    while _forking:
        _forking.pop().after_fork_in_child()


_watched = False


def _watch_forks() -> None:
    """Registers what a fork has to wait for, when the first worker is made."""
    global _watched
    if not _watched and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
        _watched = True
