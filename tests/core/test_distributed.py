"""These tests compare two gloo processes with one process on the same micro-batches: gradients and moved buffers."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from modeling_moe import MoEForCausalLM
from modeling_moe.router_balancing import exact_global_balance
from tests.builders import tiny_config
from tests.ranks import run_ranks


RANKS = 2
IDS = torch.arange(3, 39).view(4, 9)
# the ranks have one row and three rows
ROWS = (slice(0, 1), slice(1, 4))
BIAS = {"router_selection_bias": True, "router_bias_update_rate": 0.01}
KINDS = {
    "bias": {"scoring_func": "sigmoid", **BIAS},
    "proportional": {
        "num_null_experts": 3,
        "router_controller": "proportional",
        "expected_experts_per_tok": 2,
        **BIAS,
    },
    "quantile": {"router_selection_bias": True, "router_controller": "quantile"},
    "threshold": {"router_type": "expert_threshold"},
    "carried": {"router_type": "dag", **BIAS},
    "sparsity": {"router_type": "remoe", "router_sparsity_coef": 0.01},
    "global_balance": {"router_aux_loss_coef": 1.0, "router_aux_loss_scope": "global"},
}


def build(kind: str) -> MoEForCausalLM:
    """Returns a model with the same weights on every rank, without losses that are not sums over tokens."""
    torch.manual_seed(0)
    fields = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.5}
    return MoEForCausalLM(tiny_config(**(fields | KINDS[kind]))).train()


def backward(model, rows: slice, ranks: int) -> None:
    loss = model(IDS[rows], labels=IDS[rows], num_items_in_batch=IDS[:, 1:].numel()).loss
    (loss * ranks).backward()  # as `Trainer` does, since the ranks' gradients are averaged


def state_after_step(model) -> dict[str, torch.Tensor]:
    """Returns gradients and buffers."""
    model.update_routers()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | dict(model.named_buffers())


def rank_main(rank: int, folder: str) -> None:
    for kind in KINDS:
        model = build(kind)
        wrapped = DistributedDataParallel(model, find_unused_parameters=kind == "sparsity")
        backward(wrapped, ROWS[rank], RANKS)
        torch.save(state_after_step(model), f"{folder}/{kind}{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the gradients and buffers of each rank after one step of each kind."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(rank_main, RANKS, str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind, folder):
    model = build(kind)
    with exact_global_balance(model, [{"input_ids": IDS[rows]} for rows in ROWS]):
        for rows in ROWS:
            backward(model, rows, 1)
    expected, fresh = state_after_step(model), dict(build(kind).named_buffers())
    if kind != "global_balance":
        assert any(not torch.equal(buffer, fresh[name]) for name, buffer in expected.items() if name in fresh)
    for rank in range(RANKS):
        got = torch.load(folder / f"{kind}{rank}.pt")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-4, msg=name)
