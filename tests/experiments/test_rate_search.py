"""These tests check the search for learning rates on made-up losses: an arm never keeps an edge of its grid."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from experiments.design import Search
from experiments.rate_search import best_rate, find_rates, next_rates

from modeling_moe.utils.errors import UserError


SEARCH = Search([1e-3, 2e-3, 4e-3], 2.0, 6, [7, 8])


class FakeRuns:
    """These runs have the loss (ln rate - ln best)^2, plus a number that depends on the seed."""

    def __init__(self, **best: float):
        self.best, self.jobs = best, []

    def of(self, jobs, desc) -> Any:
        self.jobs += jobs
        return [
            SimpleNamespace(job=job, rate_loss=math.log(job.learning_rate / self.best[job.arm]) ** 2 + job.seed)
            for job in jobs
        ]


def test_a_grid_is_extended_on_the_side_of_the_best_rate():
    assert next_rates({1e-3: 2.0, 2e-3: 1.0, 4e-3: 3.0}, SEARCH, "a") == []
    assert next_rates({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, SEARCH, "a") == [8e-3]
    assert next_rates({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, SEARCH, "a") == [5e-4]


def test_a_diverged_rate_is_an_inner_bound():
    assert best_rate({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.nan}) == 2e-3
    assert next_rates({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.nan}, SEARCH, "a") == []
    assert next_rates({1e-3: 2.0, 2e-3: math.inf, 4e-3: math.nan}, SEARCH, "a") == [5e-4]


def test_arms_are_searched_until_no_arm_keeps_an_edge():
    runs = FakeRuns(inside=2.1e-3, high=15e-3, low=3e-4)
    found = find_rates(runs, ["inside", "high", "low"], SEARCH)
    assert list(found["inside"]) == [1e-3, 2e-3, 4e-3]
    assert list(found["high"]) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]
    assert list(found["low"]) == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    assert {arm: best_rate(losses) for arm, losses in found.items()} == {"inside": 2e-3, "high": 16e-3, "low": 2.5e-4}
    assert found["inside"][2e-3] == pytest.approx(7.5 + math.log(2 / 2.1) ** 2)
    assert len(runs.jobs) == len(set(runs.jobs)) == 2 * 15


def test_an_arm_that_keeps_the_edge_of_the_largest_grid_is_refused():
    with pytest.raises(UserError, match=r"arm 'high' prefers the edge 0\.032 of 6 learning rates"):
        find_rates(FakeRuns(high=1.0), ["high"], SEARCH)
