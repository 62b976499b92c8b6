"""Several processes on this machine that talk by gloo."""

import os
import socket
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import multiprocessing


def needs_transformers(release: str, what: str) -> pytest.MarkDecorator:
    """Skips tests on releases of transformers that lack what they test."""
    old = Version(transformers.__version__) < Version(release)
    return pytest.mark.skipif(old, reason=f"{what} needs transformers {release}")


def _start(rank: int, main: Callable, ranks: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    # where Accelerate looks too
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in address.items()})
    dist.init_process_group("gloo")
    main(rank, *arguments)
    dist.barrier()
    # no destructors: with torch 2.15 one of gloo's threads, still running then, now and again aborts a rank that is done
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(main: Callable, ranks: int, *arguments: Any, join: bool = True) -> Any:
    """Calls `main(rank, *arguments)` in each of `ranks` processes of one group; an exception in any is raised here.

    With `join=False` they run on, until the `join()` of what is returned says True.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # gloo's processes share no GPU: they would all take the first one
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        return multiprocessing.spawn(_start, args=(main, ranks, port, arguments), nprocs=ranks, join=join)
