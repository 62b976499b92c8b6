"""These tests compare Muon, averaged routers and the rest of a long run on two processes with one, and resume them."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_moe.training import LongRunArguments, RouterAverage, moe_muon, parameter_groups, scale_by_load
from modeling_moe.utils.errors import UserError
from tests.builders import sample_text, tiny_model, train_tokenizer
from tests.ranks import needs_transformers, run_ranks
from tests.training.families import tiny
from tests.training.test_sharded import PLANS, let_accelerate_split_on_cpus, losses, run


pytestmark = needs_transformers("5.23", "a model split over processes")
SHARED = {
    "role_rates": ["router=0.5"],
    "muon": True,
    "router_average": 0.7,
    "sample_steps": 2,
    "sample_prompts": ["Weg"],
    "sample_tokens": 3,
    "collapse_steps": 2,
    "collapse_entropy": 0.01,
}
CELLS = {
    "fsdp_ep": SHARED,
    "accelerate": SHARED,
    "ddp": SHARED | {"role_rates": ["router=0.5", "expert=load"]},
}


def batch() -> torch.Tensor:
    return torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def steps(model, bare, optimizer) -> RouterAverage:
    """Makes three steps on one batch, which all processes share, and follows the routers."""
    average = RouterAverage(bare, 0.7)
    for _ in range(3):
        model.train()(batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        with average.applied(), torch.no_grad():
            model(batch())  # gathers the averaged weights, which the next step must not see
    return average


def whole(named) -> dict[str, torch.Tensor]:
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).detach() for name, x in named}


def plain_steps(model_type: str) -> dict[str, torch.Tensor]:
    """Returns the weights and the average after three steps of one process."""
    model = tiny(model_type, num_local_experts=5)
    average = steps(model, model, moe_muon(model, 1e-2, 0.1))
    return whole(model.named_parameters()) | {f"average.{name}": x for name, x in average.state_dict().items()}


def rank_main(rank: int, folder: str) -> None:
    """Makes the steps under FSDP2 and DDP."""
    root = Path(folder)
    for model_type in ("mixtral", "gpt_oss"):
        sharded = tiny(model_type, num_local_experts=5)  # three experts on one process and two on the other
        for layer in sharded.model.layers if model_type == "mixtral" else ():
            fully_shard(layer)
        fully_shard(sharded)  # the root keeps what it has gathered
        average = steps(sharded, sharded, moe_muon(sharded, 1e-2, 0.1))
        found = whole(sharded.named_parameters())
        found |= {f"average.{name}": x for name, x in average.state_dict().items()}
        other = RouterAverage(sharded, 0.7)
        other.load_state_dict(average.state_dict())
        assert all(torch.equal(x, average.state_dict()[name]) for name, x in other.state_dict().items())
        if rank == 0:
            torch.save(found, root / f"fsdp_{model_type}.pt")
    try:
        scale_by_load(sharded, torch.optim.SGD(parameter_groups(sharded, 1.0)))
    except UserError as error:
        (root / f"load_{rank}.txt").write_text(str(error))
    bare = tiny("mixtral", num_local_experts=5)
    average = steps(DistributedDataParallel(bare), bare, moe_muon(bare, 1e-2, 0.1))
    if rank == 0:
        found = whole(bare.named_parameters()) | {f"average.{name}": x for name, x in average.state_dict().items()}
        torch.save(found, root / "ddp_mixtral.pt")


def run_main(rank: int, folder: str) -> None:
    """Fine-tunes and resumes."""
    let_accelerate_split_on_cpus()
    root = Path(folder)
    for name, means in CELLS.items():
        run(root, root / name, "full", run_args=LongRunArguments(**means), **PLANS[name])
        distributed.barrier()
        if rank == 0:
            shutil.copytree(root / name / "checkpoint-2", root / f"{name}_resumed" / "checkpoint-2")
        distributed.barrier()
        run(root, root / f"{name}_resumed", "full", resume="true", run_args=LongRunArguments(**means), **PLANS[name])


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """Makes the steps on two processes."""
    folder = tmp_path_factory.mktemp("steps")
    run_ranks(rank_main, 2, str(folder))
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Fine-tunes on two processes and on one."""
    folder = tmp_path_factory.mktemp("long_runs")
    model = tiny_model(
        num_experts=6, router_aux_loss_coef=0.0, router_z_loss_coef=0.1,
        scoring_func="sigmoid", router_selection_bias=True, router_bias_update_rate=0.125,
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    train_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(sample_text(), encoding="utf-8")
    run_ranks(run_main, 2, str(folder))
    for name, means in CELLS.items():
        run(folder, folder / f"{name}_one", "full", run_args=LongRunArguments(**copy.deepcopy(means)))
    return folder


@pytest.mark.parametrize(("kind", "model_type"), [("fsdp", "mixtral"), ("fsdp", "gpt_oss"), ("ddp", "mixtral")])
def test_steps_of_two_processes_equal_those_of_one(kind, model_type, stepped):
    """Experts that lie on one process, matrices that two processes share, AdamW's parameters, and the average."""
    found, expected = torch.load(stepped / f"{kind}_{model_type}.pt"), plain_steps(model_type)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


def test_rates_by_load_refuse_experts_that_are_split(stepped):
    (message,) = {(stepped / f"load_{rank}.txt").read_text() for rank in range(2)}
    assert message.endswith("FSDP, DeepSpeed or expert parallelism splits them, train with DDP")


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_a_run_of_two_processes_equals_one_and_resumes_exactly(name, tuned):
    assert losses(tuned / f"{name}_resumed") == losses(tuned / name)
    torch.testing.assert_close(losses(tuned / name), losses(tuned / f"{name}_one"), rtol=0, atol=1e-3)
    averages = [torch.load(tuned / x / "checkpoint-4" / "router_average.pt") for x in (name, f"{name}_resumed")]
    assert averages[0].keys() == {f"model.layers.{n}.mlp.gate.weight" for n in (0, 2)}
    assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])
