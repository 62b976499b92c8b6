"""These tests check plans and verdicts on made-up losses, and a whole comparison of tiny models."""

import numpy as np
import pytest
from experiments.continued_training import Runs, RunsArguments
from experiments.design import Design, Rules
from experiments.intervals import power, seeds_needed
from experiments.upcycling_comparison import compare, judge, losses, plan_seeds, report

from tests.experiments.upcycling_design import TINY, write_design


PAIRS = [("a", "b"), ("a", "c")]
RULES = Rules(["a", "b", "c"], PAIRS, [101, 102, 103], 0.01, 0.8, 0.05, 4, 20)


def test_the_largest_deviation_of_a_pair_plans_the_seeds():
    pilots = {"a": [1.0, 2.0, 3.0], "b": [1.01, 2.02, 3.03], "c": [1.0, 2.004, 3.008]}
    plan = plan_seeds(pilots, RULES)
    assert plan.deviation == pytest.approx(0.01)
    assert plan.needed == plan.seeds == seeds_needed(0.01, 0.01, power_wanted=0.8, comparisons=2)
    assert plan.power == pytest.approx(power(plan.seeds, 0.01, 0.01, comparisons=2))
    assert plan.power >= 0.8 > power(plan.seeds - 1, 0.01, 0.01, comparisons=2)


@pytest.mark.parametrize(("spread", "seeds"), [(0.001, 4), (0.1, 20)])
def test_the_number_of_seeds_stays_within_its_bounds(spread, seeds):
    pilots = {"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0 + spread, 1.0 - spread], "c": [1.0, 1.0, 1.0]}
    plan = plan_seeds(pilots, RULES)
    assert plan.seeds == seeds
    assert (plan.power >= 0.8) == (plan.needed <= seeds)


def test_the_planned_power_is_reached_in_simulated_experiments():
    rng = np.random.default_rng(0)
    seeds = seeds_needed(0.01, 0.012, power_wanted=0.8, comparisons=2)
    found, wrong = 0, 0
    for _ in range(400):
        base = rng.normal(2.0, 1.0, seeds)
        values = {"a": base, "b": base + rng.normal(0.01, 0.012, seeds), "c": base + rng.normal(0, 0.012, seeds)}
        verdicts = judge({arm: losses.tolist() for arm, losses in values.items()}, RULES)
        found += verdicts[0].claim.startswith("a has a lower loss than b")
        wrong += "lower loss" in verdicts[1].claim
    assert 0.75 < found / 400 < 0.92
    assert wrong / 400 < 0.08


@pytest.mark.parametrize(
    ("shift", "noise", "claim"),
    [
        (0.05, 0.005, "a has a lower loss than b"),
        (-0.05, 0.005, "b has a lower loss than a"),
        (0.004, 0.001, "a has a lower loss than b, by less than is of interest"),
        (0.0005, 0.002, "a and b differ by less than 0.01"),
        (0.01, 0.03, "undecided between a and b"),
    ],
)
def test_verdicts(shift, noise, claim):
    wave = [noise * value for value in (1, -1, 0.5, -0.5, 0)]
    values = {"a": [2.0] * 5, "b": [2.0 + shift + value for value in wave], "c": [2.0 + value for value in wave]}
    verdict = judge(values, RULES)[0]
    assert verdict.claim == claim
    assert verdict.difference.mean == pytest.approx(-shift)


def test_a_difference_must_survive_the_correction():
    rng = [0.006, -0.006, 0.004, -0.004, 0.0]
    values = {"a": [2.0] * 5, "b": [2.0068 + value for value in rng], "c": [2.0] * 4 + [2.001]}
    alone, corrected = (
        judge(values, Rules(["a", "b", "c"], pairs, [], 0.001, 0.8, 0.05, 4, 20))[0] for pairs in (PAIRS[:1], PAIRS)
    )
    assert alone.adjusted_p_value < 0.05 < corrected.adjusted_p_value == 2 * alone.adjusted_p_value
    assert alone.claim == "a has a lower loss than b"
    assert corrected.claim == "undecided between a and b"


def test_a_whole_comparison(tmp_path):
    # the best rate of tiny models lies far up
    search = TINY["search"] | {"rates": [1e-2, 1e-1], "most": 6}
    design = Design.read(write_design(tmp_path, search=search))
    args = RunsArguments(runs_file=str(tmp_path / "runs.jsonl"), dense_dir=str(tmp_path / "dense"))
    result = compare(design, Runs(design, args))
    assert list(result.runs) == design.comparison.arms
    for arm, runs in result.runs.items():
        assert [run.seed for run in runs] == [1, 2]
        assert {run.learning_rate for run in runs} == {result.rates[arm]}
        assert min(result.tried[arm]) < result.rates[arm] < max(result.tried[arm])
    expected = np.subtract(losses(result.runs["exact"]), losses(result.runs["dense"])).mean()
    assert result.verdicts[0].difference.mean == pytest.approx(expected)
    text = report(design, result)
    assert f"| exact | dense | {expected:+.4f} (" in text
    assert f"{result.plan.seeds} were trained" in text
    for arm in design.comparison.arms:
        assert f"| {arm} | {design.config(arm).num_params():,} |" in text
    before = (tmp_path / "runs.jsonl").read_text()
    assert report(design, compare(design, Runs(design, args))) == text
    assert (tmp_path / "runs.jsonl").read_text() == before
