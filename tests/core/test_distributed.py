"""Two gloo processes against one: gradients of a data-parallel step, and the load that moves the bias."""

import socket

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from modeling_moe import MoEForCausalLM
from tests.conftest import tiny_config


RANKS = 2
IDS = torch.arange(3, 39).view(4, 9)


def build() -> MoEForCausalLM:
    """The same weights on every rank; the balance loss is off, which is no sum over tokens."""
    torch.manual_seed(0)
    fields = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.5}
    bias = {"scoring_func": "sigmoid", "router_selection_bias": True, "router_bias_update_rate": 0.01}
    return MoEForCausalLM(tiny_config(**fields, **bias)).train()


def one_step(model, rows: slice, ranks: int) -> None:
    loss = model(IDS[rows], labels=IDS[rows], num_items_in_batch=IDS[:, 1:].numel()).loss
    (loss * ranks).backward()  # as `Trainer` does, since the ranks' gradients are averaged


def rank_main(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = build()
    # uneven: one row here, three there
    one_step(DistributedDataParallel(model), slice(0, 1) if rank == 0 else slice(1, 4), RANKS)
    model.update_routers()
    result = {name: parameter.grad for name, parameter in model.named_parameters()}
    result |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(rank_main, args=(port, str(tmp_path)), nprocs=RANKS)
    model = build()
    one_step(model, slice(0, 4), 1)
    model.update_routers()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    assert any(bias.any() for name, bias in expected.items() if name.endswith("correction_bias"))
    for rank in range(RANKS):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-4, msg=name)
