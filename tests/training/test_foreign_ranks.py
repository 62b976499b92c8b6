"""These tests balance transformers' own MoE models on two processes, and compare with one process."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_moe.training import balance, enable
from tests.ranks import needs_transformers, run_ranks
from tests.training.test_foreign_balance import ROWS, SUMS, assert_close, foreign, gradients, train
from tests.training.test_foreign_bias import RATE, biases, random_model


SPLITS = (1, 4)
SPLITTING = Version("5.23")  # release of transformers that trains a model split over processes
IDS = torch.arange(3, 35).view(4, 8)


def stepped(folder: Path, split: int, ranks: int) -> dict:
    """Returns the gradients of one step of a Trainer on 1 / `split` of the rows, and the biases after three steps."""
    sizes = {"per_device_train_batch_size": ROWS // split // ranks, "gradient_accumulation_steps": split}
    model = foreign("mixtral")
    with balance(model, **SUMS):
        found = train(model, folder, **sizes).gradients
    biased = random_model("minimax_m2")
    with balance(biased, **SUMS, router_bias_update_rate=RATE) as handle:
        train(biased, folder, max_steps=3, learning_rate=0.01, **sizes)
        losses = handle.losses()
    return {"gradients": found, "biases": biases(biased), "losses": losses}


def sharded(folder: Path, rank: int) -> dict:
    """Returns gradients and biases of one step of a model that FSDP splits over two processes."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2)).train()
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with balance(model, **SUMS, router_bias_update_rate=RATE) as handle:
        ids = IDS[2 * rank : 2 * rank + 2]
        model(input_ids=ids, labels=ids).loss.backward()
        handle.step()
    found = {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients(model).items()
    }
    return {"gradients": found, "biases": biases(model)}


def rank_main(rank: int, folder: str) -> None:
    """Runs all cells in one of two processes, and saves what each gave."""
    enable()
    found: dict = {split: stepped(Path(folder), split, 2) for split in SPLITS}
    if (Path(folder) / "model").is_dir():
        found["fsdp"] = sharded(Path(folder) / "model", rank)
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict:
    """Maps (split, ranks, rank) to what a step gave."""
    folder = tmp_path_factory.mktemp("ranks")
    model = random_model("minimax_m2")
    if Version(transformers.__version__) >= SPLITTING:
        model.save_pretrained(folder / "model")
    context = run_ranks(rank_main, 2, str(folder), join=False)
    enable()
    found = {(1, 1, 0): stepped(folder, 1, 1)}
    with balance(model, **SUMS, router_bias_update_rate=RATE) as handle:
        model(input_ids=IDS, labels=IDS).loss.backward()
        handle.step()
    found["fsdp", 1, 0] = {"gradients": gradients(model), "biases": biases(model)}
    while not context.join():
        pass
    for rank in range(2):
        found |= {(split, 2, rank): step for split, step in torch.load(folder / f"rank{rank}.pt").items()}
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("split", SPLITS)
def test_a_step_of_two_processes_is_that_of_one(split, rank, table):
    got, expected = table[split, 2, rank], table[1, 1, 0]
    assert_close(got["gradients"], expected["gradients"], 1e-6)
    assert got["biases"].keys() == expected["biases"].keys()
    for name, bias in expected["biases"].items():
        assert torch.equal(got["biases"][name], bias)
        assert bias.any()
    assert got["losses"] == table[split, 2, 1 - rank]["losses"]


@needs_transformers(str(SPLITTING), "a model split over processes")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_split_model_has_the_gradients_and_biases_of_a_whole_one(rank, table):
    got, expected = table["fsdp", 2, rank], table["fsdp", 1, 0]
    assert_close(got["gradients"], expected["gradients"], 1e-4)
    assert got["biases"].keys() == expected["biases"].keys()
    assert all(torch.equal(got["biases"][name], bias) for name, bias in expected["biases"].items())
