"""These tests run the drift experiment at the smallest size: what is frozen stays, and the figures say so."""

from pathlib import Path

import pytest
import torch
from experiments import expert_drift as experiment
from experiments.expert_drift import (
    ARMS,
    METRICS,
    OLD,
    DriftArguments,
    Figures,
    Run,
    comparisons,
    grown,
    learn,
    markdown,
)
from experiments.small_models import new_model
from experiments.text_domains import domain_bytes

from modeling_moe.utils.errors import UserError


SMALLEST = {"seeds": 2, "steps": 2, "later_steps": 2, "rows": 2, "length": 24, "held_out_rows": 2}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_trains_what_it_says(name):
    arm, args = ARMS[name], DriftArguments(**SMALLEST)
    model = new_model(0)
    if arm.grows:
        model = grown(model, args.new_experts, 0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    learn(model, arm, domain_bytes("tables")[0], args, 0)
    for key, tensor in model.state_dict().items():
        moved = (tensor != before[key]).flatten(1).any(dim=1) if tensor.dim() > 1 else tensor != before[key]
        if ".experts." in key:
            assert moved[: len(OLD)].any() == (arm.frozen == "nothing"), key
            assert not arm.grows or moved[len(OLD) :].any(), key
        elif key.endswith("gate.weight"):
            assert moved[: len(OLD)].any() == (arm.frozen != "rest"), key
        elif key.endswith("q_proj.weight"):
            assert moved.any() == (arm.frozen != "rest"), key


def test_runs_are_repeatable_and_kept(tmp_path):
    args = DriftArguments(**SMALLEST, runs_file=str(tmp_path / "runs.jsonl"))
    runs = experiment.compare(args)
    for run in runs:
        assert len({*run.first, run.later}) == 5
        assert set(run.arms) == set(ARMS)
        for name, figures in run.arms.items():
            still = ARMS[name].frozen != "nothing"
            assert (figures.weight_change == figures.output_change == 0) == still
            assert (figures.new_share_a > 0) == ARMS[name].grows
    assert experiment.compare(args) == runs
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    assert experiment.run_seed(1, args) == runs[1]


def test_the_tables_hold_means_and_corrected_comparisons():
    def figures(forgetting: float) -> Figures:
        return Figures(forgetting, 2.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0)

    runs = [
        Run(seed, ["a"], "b", 1.0, 3.0, {arm: figures(place + seed * (1 + place)) for place, arm in enumerate(ARMS)})
        for seed in range(3)
    ]
    found = {row[:3]: row[3] for row in comparisons(runs)}
    assert found["forgetting", "grown", "all weights"].mean == pytest.approx(4.0)
    assert found["loss_b", "grown", "all weights"].mean == 0
    assert len(found) == len(METRICS) * len(experiment.PAIRS)
    assert "| all weights | +1.000 | +0.000 | 2.000 | 10% | 20% | 30% | 40% | 50% |" in markdown(runs)


def test_the_page_shows_the_stored_runs(monkeypatch):
    def train(*_):
        raise AssertionError("the page's runs lack a seed")

    monkeypatch.setattr(experiment, "run_seed", train)
    science = Path(__file__).parents[2] / "docs" / "science"
    stored, page = science / "runs" / "expert_drift.jsonl", (science / "expert-drift.md").read_text(encoding="utf-8")
    seeds = len(stored.read_text(encoding="utf-8").splitlines())
    assert f"--seeds {seeds} " in page
    assert markdown(experiment.compare(DriftArguments(seeds=seeds, runs_file=str(stored)))) in page


def test_growth_changes_nothing_but_by_the_release():
    model = new_model(0).eval()
    larger = grown(model, 4, 0).eval()
    assert larger.config.num_experts == 12
    assert not larger.model.sparse_blocks()[0].gate.e_score_correction_bias.any()
    for block, old in zip(larger.model.sparse_blocks(), model.model.sparse_blocks(), strict=True):
        assert torch.equal(block.experts.down_proj[:8], old.experts.down_proj)
        assert torch.equal(block.gate.weight[:8], old.gate.weight)


@pytest.mark.parametrize("fields", [{"seeds": 1}, {"new_experts": 0}])
def test_arguments_out_of_range_are_refused(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"{name} is {fields[name]}"):
        DriftArguments(**fields)
