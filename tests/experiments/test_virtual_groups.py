"""These tests check the measurement of virtual groups on tiny models."""

import pytest
from experiments import virtual_groups
from experiments.continued_training import Runs, RunsArguments, arm_model, dense_state, held_out_loss, train_dense
from experiments.design import Design
from experiments.virtual_groups import Watched, report, watch_all, whole_share

from tests.experiments.upcycling_design import TINY, write_design


@pytest.fixture
def design(tmp_path):
    return Design.read(write_design(tmp_path, arms=TINY["arms"] | {virtual_groups.ARM: TINY["arms"]["exact"]}))


def test_groups_are_whole_until_their_rows_differ(design, tmp_path):
    train_dense(design, tmp_path / "dense")
    model = arm_model(design, "exact", dense_state(design, tmp_path / "dense"), 1)
    rows = design.text.rates
    assert whole_share(model, rows, 4) == (1.0, pytest.approx(held_out_loss(model, rows)))
    for block in model.model.sparse_blocks():
        # the first shard of every replica is never chosen, so that other replicas fill its place
        block.gate.weight.data[::4] = 0
        block.gate.weight.data[1::4] *= 10
    assert whole_share(model, rows, 4)[0] < 0.5
    assert not model.model.sparse_blocks()[0].gate._forward_hooks


def test_runs_of_all_steps_are_kept(design, tmp_path, monkeypatch):
    monkeypatch.setattr(virtual_groups, "STEPS", (0, 5))
    monkeypatch.setattr(virtual_groups, "SEEDS", (1, 2))
    monkeypatch.setattr(virtual_groups, "RATE", 0.1)
    args = RunsArguments(runs_file=str(tmp_path / "runs.jsonl"), dense_dir=str(tmp_path / "dense"))
    found = watch_all(design, Runs(design, args), str(tmp_path / "groups.jsonl"))
    assert [(run.router_std, run.steps, run.seed) for run in found[:4]] == [
        (0.02, 0, 1),
        (0.02, 0, 2),
        (0.02, 5, 1),
        (0.02, 5, 2),
    ]
    assert all(run.whole == 1.0 for run in found if run.steps == 0)
    assert all(run.whole < 0.9 for run in found if run.steps == 5 and run.router_std == 0.02)
    assert found[0].loss == pytest.approx(found[4].loss, abs=1e-5)
    assert watch_all(design, Runs(design, args), str(tmp_path / "groups.jsonl")) == found


def test_the_table_has_means_over_seeds():
    runs = [Watched(0.02, 1, seed, whole, 1.5) for seed, whole in ((1, 0.5), (2, 0.7))]
    assert "| 0.02 | 1 | 60.0% (" in report(runs)
