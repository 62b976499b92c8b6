"""These tests run RoutingCallback in two processes: the figures are those of one process with the whole batch."""

import json
from pathlib import Path

import pytest
from torch.distributed.fsdp import fully_shard

from modeling_moe.monitoring import RoutingCallback, sparse_layers
from modeling_moe.monitoring.loss_meter import RouterLossMeter
from modeling_moe.monitoring.router_gradients import RouterGradientMeter
from tests.builders import tiny_model
from tests.monitoring.test_callback import Tracker, figures, make_trainer, token_ids
from tests.ranks import run_ranks


FIELDS = {"max_steps": 2, "report_to": "none", "learning_rate": 0.0}


def train(tracker: Tracker, folder: Path, batch: int):
    """Trains for two steps without moving the weights; returns the trainer."""
    model = tiny_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.001)
    trainer = make_trainer(model, folder, [tracker, RoutingCallback()], per_device_train_batch_size=batch, **FIELDS)
    trainer.train()
    return trainer


def ddp(rank: int, folder: Path) -> None:
    tracker = Tracker()
    trainer = train(tracker, folder, batch=4)
    assert trainer.args.world_size == 2
    assert trainer.args.should_log == (rank == 0)
    (folder / f"rank{rank}.json").write_text(json.dumps([tracker.logged, trainer.state.log_history]))


def sharded(rank: int, folder: Path) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    layers = sparse_layers(model)
    gradients, losses = RouterGradientMeter(model, layers), RouterLossMeter(model)
    ids = token_ids().chunk(2)[rank]
    model.train()(ids, labels=ids).loss.backward()
    gradients.measure()
    (folder / f"fsdp{rank}.json").write_text(json.dumps([gradients.read(), losses.read()]))


def rank_main(rank: int, folder: Path) -> None:
    ddp(rank, folder)
    sharded(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with what two processes measured."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(rank_main, 2, folder)
    return folder


def test_ddp_logs_the_figures_of_both_processes_once(folder, tmp_path):
    (logged, history), (nothing, other_history) = (
        json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)
    )
    assert nothing == []
    alone = Tracker()
    train(alone, tmp_path, batch=8)
    assert len(alone.routing) == 2
    for both, one in zip(logged, alone.logged, strict=True):
        # the balance loss is not a sum over tokens, and logged as the mean of the processes' own
        ours, theirs = (figures(entry) for entry in (both, one))
        assert ours.pop("routing/balance_loss", 3) == pytest.approx(theirs.pop("routing/balance_loss", 3), rel=0.1)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    # all processes write the same history, whichever of them saves it
    assert [figures(entry) for entry in history] == [figures(entry) for entry in other_history]


def test_fsdp_shows_the_norm_of_the_whole_gradient(folder):
    one, other = (json.loads((folder / f"fsdp{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    model = tiny_model().train()
    for ids in token_ids().chunk(2):
        (model(ids, labels=ids).loss / 2).backward()
    norms = {layer.name: layer.router.weight.grad.norm().item() for layer in sparse_layers(model)}
    assert one[0] == pytest.approx(norms, rel=1e-4)
    halves = [model.model(ids).aux_loss.item() for ids in token_ids().chunk(2)]
    assert one[1]["balance"] == pytest.approx(sum(halves) / 2, rel=1e-5)
