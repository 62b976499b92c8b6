"""These tests compare intervals, corrections, plans and rankings with published values and with simulations."""

import math
import statistics
import sys

import numpy as np
import pytest
from experiments.intervals import (
    Difference,
    against,
    deviation_bound,
    holm,
    interval,
    paired,
    power,
    ranking,
    seeds_needed,
    unpaired,
)

from modeling_moe.utils.errors import UserError


# additional hours of sleep by two drugs in ten patients (Student, 1908), the data set `sleep` of R
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_paired_as_in_r():
    # t.test(first, second, paired = TRUE)
    assert paired(FIRST, SECOND) == pytest.approx((-1.58, -2.4598858, -0.7001142, 0.00283289), abs=1e-6)
    differences = [a - b for a, b in zip(FIRST, SECOND, strict=True)]
    assert interval(differences) == pytest.approx(paired(FIRST, SECOND)[:3])
    # qt(0.995, 9) / qt(0.975, 9)
    wide, narrow = paired(FIRST, SECOND, 0.99), paired(FIRST, SECOND)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(3.249836 / 2.262157, abs=1e-5)


def test_unpaired_as_in_r():
    # t.test(first, second)
    assert unpaired(FIRST, SECOND) == pytest.approx((-1.58, -3.3654832, 0.2054832, 0.07939414), abs=1e-6)
    # t.test(first, second[1:4])
    assert unpaired(FIRST, SECOND[:4]).mean == pytest.approx(0.75 - 0.975)


def test_values_without_deviation():
    assert paired([1.0, 2.0], [1.0, 2.0]) == Difference(0.0, 0.0, 0.0, 1.0)
    assert paired([2.0, 3.0], [1.0, 2.0]) == Difference(1.0, 1.0, 1.0, 0.0)
    assert unpaired([2.0, 2.0], [2.0, 2.0]).p_value == 1
    assert unpaired([2.0, 2.0], [1.0, 1.0]) == Difference(1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(statistics.StatisticsError, match="two data points"):
        interval([1.0])


def test_more_than_ten_seeds():
    mean, low, high = interval([float(value) for value in range(31)])
    # qt(0.975, 30) times the standard error
    half = 2.042272 * math.sqrt(31 * 32 / 12 / 31)
    assert (mean, high - mean, mean - low) == pytest.approx((15.0, half, half), abs=1e-5)


def test_holm_by_hand():
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.001, 0.2, 0.5]) == pytest.approx([0.003, 0.4, 0.5])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_power_as_in_r():
    # power.t.test(n = 20, delta = 1, sd = 1) and power.t.test(delta = 1, sd = 1, power = 0.8), also type = "paired"
    assert power(20, 1.0, 1.0, pairs=False) == pytest.approx(0.8689528, abs=1e-5)
    assert seeds_needed(1.0, 1.0, pairs=False) == 17
    assert seeds_needed(1.0, 1.0) == 10
    assert seeds_needed(-0.01, 0.01) == 10
    assert power(10, 0.0, 1.0) == pytest.approx(0.05)
    assert seeds_needed(1.0, 1.0, comparisons=5) == seeds_needed(1.0, 1.0, alpha=0.01) > 10
    assert seeds_needed(1000.0, 1.0) == 2
    with pytest.raises(UserError, match="over 100000 seeds"):
        seeds_needed(1e-6, 1.0)


def test_power_is_the_share_of_found_differences():
    rng = np.random.default_rng(0)
    firsts, seconds = rng.normal(0.8, 1.0, size=(1000, 8)), rng.normal(0.0, 1.0, size=(1000, 8))
    found = [
        unpaired(first.tolist(), second.tolist()).p_value < 0.05 for first, second in zip(firsts, seconds, strict=True)
    ]
    assert np.mean(found) == pytest.approx(power(8, 0.8, 1.0, pairs=False), abs=0.04)


def test_the_bound_of_a_deviation_covers():
    rng = np.random.default_rng(0)
    bounds = [deviation_bound(values.tolist()) for values in rng.normal(0.0, 2.0, size=(2000, 4))]
    assert np.mean(np.array(bounds) > 2.0) == pytest.approx(0.8, abs=0.03)
    # sqrt(2 / qchisq(0.2, 2))
    assert deviation_bound([-1.0, 0.0, 1.0]) == pytest.approx(2.117, abs=1e-3)


def test_ranking_by_hand():
    values = {"c": [9.0, 9.0, 9.0], "a": [1.0, 1.3, 0.7], "b": [1.1, 0.8, 1.4]}
    found = ranking(values)
    means = {"c": 9.0, "a": 1.0, "b": 1.1}
    seed_means = [statistics.fmean(column) for column in zip(*values.values(), strict=True)]
    squares = sum(
        (value - means[name] - mean + statistics.fmean(seed_means)) ** 2
        for name, row in values.items()
        for value, mean in zip(row, seed_means, strict=True)
    )
    assert found.deviation == pytest.approx((squares / 4) ** 0.5)
    # qtukey(0.95, 3, 4)
    assert found.least_difference == pytest.approx(5.040241 * found.deviation / 3**0.5, rel=1e-5)
    assert found.first == {"c": 3, "a": 1, "b": 1}
    assert found.last == {"c": 3, "a": 2, "b": 2}


def test_against_a_baseline_by_hand():
    # two arms: the shared deviation is that of the pairs, so that the test is Student's paired one
    assert against({"a": FIRST, "b": SECOND}, "b") == {"a": pytest.approx(paired(FIRST, SECOND))}
    values = {"a": [1.0, 1.3, 0.7], "b": [1.1, 0.8, 1.4], "c": [9.0, 9.0, 9.0]}
    found = against(values, "a")
    assert list(found) == ["b", "c"]
    # qt(0.975, 4)
    half = 2.776445 * ranking(values).deviation * (2 / 3) ** 0.5
    assert found["c"][:3] == pytest.approx((8.0, 8.0 - half, 8.0 + half), abs=1e-6)


def test_an_effect_of_the_seed_does_not_count():
    rng = np.random.default_rng(0)
    noise, seeds = rng.normal(0.0, 0.01, size=(4, 5)), rng.normal(0.0, 10.0, size=5)
    plain, shifted = ({str(arm): row.tolist() for arm, row in enumerate(noise + add)} for add in (0.0, seeds))
    assert ranking(shifted).least_difference == pytest.approx(ranking(plain).least_difference)


def test_equal_arms_are_told_apart_in_one_of_twenty_rankings():
    rng = np.random.default_rng(0)
    wrong = 0
    for table in rng.normal(0.0, 1.0, size=(300, 5, 4)):
        found = ranking({str(arm): row.tolist() for arm, row in enumerate(table)})
        wrong += max(found.first.values()) > 1
    assert 5 <= wrong <= 27


def test_deviations_that_differ_are_noticed():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 1.0, 1.0, 20.0])[:, None]
    table = rng.normal(0.0, 1.0, size=(4, 8)) * scales
    assert ranking({str(arm): row.tolist() for arm, row in enumerate(table)}).spread_p_value < 0.01
    table /= scales
    assert ranking({str(arm): row.tolist() for arm, row in enumerate(table)}).spread_p_value > 0.05


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"pip install 'modeling-moe\[science\]'"):
        interval([1.0, 2.0])
