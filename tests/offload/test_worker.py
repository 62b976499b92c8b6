"""This module tests the thread that runs the newest of several tasks: order, dropping, end, forks, Ctrl-C and exit."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from modeling_moe.offload import worker as worker_module
from modeling_moe.offload.worker import Worker


# a script gets the module by its path, since the package takes seconds to import
SCRIPT = f"""
import importlib.util, os, signal, sys, threading, time, weakref
spec = importlib.util.spec_from_file_location("worker", {str(Path(worker_module.__file__))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
worker = module.Worker("test")
def forever():
    while True:
        time.sleep(0.001)
        yield
"""


def run_script(script: str, timeout: float = 30) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SCRIPT + script], capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def worker():
    worker = Worker("test")
    yield worker
    worker.close()


def test_tasks_run_in_another_thread_in_order(worker):
    seen = []

    def task(number):
        seen.append((number, threading.current_thread() is threading.main_thread()))
        yield
        seen.append(number)

    for number in range(3):
        worker.submit(task(number))
        assert worker.wait(10)
    assert seen == [(0, False), 0, (1, False), 1, (2, False), 2]


def test_a_new_task_replaces_the_waiting_one_and_ends_the_running_one_after_the_step_at_hand(worker):
    seen, entered, leave = [], threading.Event(), threading.Event()

    def slow():
        entered.set()
        leave.wait(10)
        seen.append("step")
        yield
        seen.append("never")

    def task(name):
        seen.append(name)
        yield

    worker.submit(slow())
    assert entered.wait(10)
    worker.submit(task("replaced"))
    worker.submit(task("newest"))
    leave.set()
    assert worker.wait(10)
    assert seen == ["step", "newest"]


def test_drop_ends_the_running_task_and_waits_for_nothing(worker):
    seen, entered, leave = [], threading.Event(), threading.Event()

    def slow():
        entered.set()
        leave.wait(10)
        yield
        seen.append("never")

    worker.submit(slow())
    assert entered.wait(10)
    worker.drop()
    assert not worker.wait(0.01)
    leave.set()
    assert worker.wait(10)
    assert seen == []


def test_a_closed_worker_runs_nothing_and_its_thread_has_ended():
    worker, seen = Worker("closing"), []
    worker.submit(iter(()))
    assert worker.wait(10)
    worker.close()
    worker.close()
    worker.submit(seen.append(n) for n in range(3))
    assert "closing" not in [thread.name for thread in threading.enumerate()]
    assert seen == []


def test_a_worker_without_a_task_has_no_thread():
    before = threading.active_count()
    Worker("idle").close()
    assert threading.active_count() == before


def test_the_thread_keeps_nothing_of_a_finished_task(worker):
    class Kept:
        pass

    def task(kept):
        yield

    gone, kept = threading.Event(), Kept()
    weakref.finalize(kept, gone.set)
    worker.submit(task(kept))
    del kept
    assert gone.wait(10)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_worker_cannot_be_copied(worker, copied):
    with pytest.raises(TypeError, match="a thread cannot be copied or pickled"):
        copied(worker)


def test_the_process_ends_while_a_task_runs():
    done = run_script("""
class Owner: pass
owner = Owner()
weakref.finalize(owner, worker.close)
worker.submit(forever())
time.sleep(0.1)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_ends_the_process_while_a_task_runs():
    done = run_script("""
worker.submit(forever())
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    worker.wait()
except KeyboardInterrupt:
    worker.close()
    print("interrupted", worker.wait(5))
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted True\n", "")


@pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(signal, "alarm"), reason="needs POSIX")
def test_a_forked_child_finds_no_lock_held_and_starts_its_own_thread():
    done = run_script("""
lock = threading.Lock()  # as that of a cache
def task():
    while True:
        with lock:
            time.sleep(0.002)
        yield
worker.submit(task())
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a deadlock kills the child
        seen = []
        with lock:
            pass
        assert worker.wait(5)
        worker.submit(seen.append(None) or None for _ in range(3))
        assert worker.wait(5) and len(seen) == 3
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.001)
seen = []
worker.submit(seen.append(None) or None for _ in range(3))
assert worker.wait(5) and len(seen) == 3
worker.close()
print("done")
""")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
