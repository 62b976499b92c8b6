"""These tests check the laws' fits on made-up gains, and a whole experiment on the number of experts."""

from dataclasses import replace

import numpy as np
import pytest
from experiments.continued_training import Runs, RunsArguments
from experiments.design import Design
from experiments.expert_growth import LAWS, Points, fit_law, grow, jackknife, left_out_errors, measure_costs
from experiments.expert_growth_report import draw, report
from experiments.intervals import interval

from modeling_moe.utils.errors import UserError
from tests.experiments.upcycling_design import TINY, write_design


EXPERTS = np.array([2.0, 4.0, 8.0, 16.0, 32.0])
PARAMETERS = 0.4 + 0.3 * EXPERTS
GRID = [2.0, 8.0, 32.0]


def points(gain: np.ndarray, noise: float = 0.0) -> Points:
    return Points(EXPERTS, PARAMETERS, gain + np.random.default_rng(0).normal(0, noise, (6, 5)))


def logarithm() -> np.ndarray:
    return 0.01 + 0.02 * np.log(EXPERTS)


def power_law() -> np.ndarray:
    return 0.09 - 0.08 * PARAMETERS**-1.5


def test_laws_find_their_own_coefficients():
    fit = fit_law(LAWS["logarithm"], points(logarithm()), GRID)
    assert [value.mean for value in fit.values.values()] == pytest.approx([0.01, 0.02])
    assert [value.mean for value in fit.curve] == pytest.approx(logarithm()[[0, 2, 4]].tolist())
    fit = fit_law(LAWS["power law"], points(power_law()), GRID)
    assert [value.mean for value in fit.values.values()] == pytest.approx([0.09, 0.08, 1.5], rel=1e-2)
    assert fit.residual == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("gain", "better", "worse"),
    [
        (logarithm(), "logarithm", "power law"),
        (power_law(), "power law", "logarithm"),
    ],
)
def test_the_true_law_predicts_the_left_out_experts_better(gain, better, worse):
    fits = {name: fit_law(law, points(gain, 1e-5), GRID) for name, law in LAWS.items()}
    assert fits[better].left_out < fits[worse].left_out
    assert abs(fits[better].largest) < abs(fits[worse].largest)


def test_left_out_errors_are_those_of_a_straight_line():
    bent = logarithm()
    bent[2] += 0.003
    errors = left_out_errors(LAWS["logarithm"], EXPERTS, PARAMETERS, bent)
    assert errors[2] == pytest.approx(-0.003, abs=1e-6)
    assert errors[4] == pytest.approx(0.003 * -0.5 + 0.003 * 0, abs=3e-3)


def test_the_jackknife_of_a_mean_is_students_interval():
    values = [0.3, 0.5, 0.1, 0.9]
    left_out = [(sum(values) - value) / 3 for value in values]
    assert jackknife(sum(values) / 4, left_out) == pytest.approx(interval(values))


def test_slopes_have_students_interval_over_the_slopes_of_the_seeds():
    measured = points(logarithm(), 0.004)
    fit = fit_law(LAWS["logarithm"], measured, GRID)
    slopes = [np.polyfit(np.log(EXPERTS), gains, 1)[0] for gains in measured.gains]
    assert fit.values["b"] == pytest.approx(interval(slopes), abs=1e-6)


def test_a_whole_experiment(tmp_path):
    search = TINY["search"] | {"rates": [1e-2, 1e-1, 1.0]}
    design = Design.read(write_design(tmp_path, search=search))
    args = RunsArguments(runs_file=str(tmp_path / "runs.jsonl"), dense_dir=str(tmp_path / "dense"))
    result = grow(design, Runs(design, args), str(tmp_path / "costs.jsonl"))
    assert result.experts == {"E=2": 2, "E=4": 4, "E=8": 8, "E=16": 16}
    assert result.parameters["E=2"] == pytest.approx(1.0, abs=0.01)
    assert all(cost.step_seconds > 0 and cost.kept_bytes > 0 for cost in result.costs.values())
    differences = [a.test_loss - b.test_loss for a, b in zip(result.runs["dense"], result.runs["E=8"], strict=True)]
    assert result.gains["E=8"] == pytest.approx(interval(differences))
    text = report(design, result)
    for arm in ("dense", *design.growth.arms):
        assert f"| {arm} | {design.config(arm).num_params():,} |" in text
    for law in LAWS.values():
        assert law.formula in text
    draw(str(tmp_path / "growth.png"), result)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    again = grow(design, Runs(design, args), str(tmp_path / "costs.jsonl"))
    assert report(design, again) == text
    design = Design.read(write_design(tmp_path, training=TINY["training"] | {"steps": 5}))
    runs = Runs(design, replace(args, runs_file=str(tmp_path / "other.jsonl")))
    with pytest.raises(UserError, match=r"costs\.jsonl holds runs with other arguments"):
        measure_costs(design, runs, design.growth.arms, str(tmp_path / "costs.jsonl"))
