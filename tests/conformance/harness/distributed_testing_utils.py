"""Stand-in for the module with which transformers' tests start ranks: here gloo processes on the CPU."""

import functools
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


PRELOAD = [  # imported once, in the process that the ranks are forked from
    "modeling_moe",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers_tests.test_expert_parallel_mixin",
    "transformers_tests.test_fsdp_mixin",
]


def _get_distributed_backend():
    return "gloo"


def _get_distributed_device_type():
    return "cpu"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass


def _start_rank_processes(function, args, nprocs):
    mp.set_forkserver_preload(PRELOAD)
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _run_rank(rank, world_size, port, function, args, kwargs):
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    def decorate(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # lives until the ranks end
            _start_rank_processes(_run_rank, (world_size, server.port, function, args, kwargs), world_size)

        return run

    return decorate
