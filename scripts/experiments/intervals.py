# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module computes confidence intervals of differences between seeds, corrects them for the number of comparisons,
plans the number of seeds, and states what may be claimed. Distributions come from scipy.
"""

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np

from modeling_moe.utils.errors import UserError


Arm = TypeVar("Arm", bound=Hashable)
# most seeds that a plan may ask for
MOST_SEEDS = 100_000


def scipy_stats() -> ModuleType:
    """Imports scipy's distributions.

    Raises:
        UserError: if scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("intervals need scipy: pip install 'modeling-moe[science]'") from error
    return stats


class Interval(NamedTuple):
    """Holds a mean and the ends of a 95% confidence interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Holds the mean difference of two arms, the ends of a confidence interval, and the p-value of "no difference"."""

    mean: float
    low: float
    high: float
    p_value: float


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Returns the mean of at least 2 numbers with a confidence interval by Student's t.

    Args:
        values: one number for each seed, or one paired difference for each seed.
        level: probability that the interval covers the true mean.

    Raises:
        ValueError: if there are fewer than 2 values.
    """
    error = statistics.stdev(values) / math.sqrt(len(values))
    return _around(statistics.fmean(values), error, len(values) - 1, level)


def paired(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Difference:
    """Compares two arms whose values come in pairs with equal seeds, by Student's paired t-test.

    Args:
        first, second: values of the arms; entries at one place have one seed.
        level: probability that the interval covers the true mean of `first - second`.

    Raises:
        ValueError: if the arms have different numbers of values, or fewer than 2.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return _difference(statistics.fmean(differences), error, len(differences) - 1, level)


def unpaired(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Difference:
    """Compares two arms whose values are independent, by Welch's t-test, which allows unequal variances.

    Args:
        first, second: values of the arms.
        level: probability that the interval covers the true difference of the means.

    Raises:
        ValueError: if an arm has fewer than 2 values.
    """
    squares = [statistics.variance(values) / len(values) for values in (first, second)]  # of the standard errors
    mean = statistics.fmean(first) - statistics.fmean(second)
    if sum(squares) == 0:
        return _difference(mean, 0.0, 1, level)
    # Welch-Satterthwaite
    freedom = sum(squares) ** 2 / (squares[0] ** 2 / (len(first) - 1) + squares[1] ** 2 / (len(second) - 1))
    return _difference(mean, math.sqrt(sum(squares)), freedom, level)


def _around(mean: float, error: float, freedom: float, level: float) -> Interval:
    half = float(scipy_stats().t.ppf((1 + level) / 2, freedom)) * error
    return Interval(mean, mean - half, mean + half)


def _difference(mean: float, error: float, freedom: float, level: float) -> Difference:
    if error == 0:  # t is 0/0 or infinite: runs that are equal in every seed do not differ
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    p_value = 2 * float(scipy_stats().t.sf(abs(mean) / error, freedom))
    return Difference(*_around(mean, error, freedom, level), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number by Holm (1979), in the order of `p_values`.

    Claims with adjusted p-values below 0.05 are all true with a probability of at least 95 %.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def power(
    seeds: int, difference: float, deviation: float, *, alpha: float = 0.05, comparisons: int = 1, pairs: bool = True
) -> float:
    """Returns the probability that a two-sided t-test finds a difference.

    Args:
        seeds: number of pairs, or of values in each of two arms; at least 2.
        difference: true difference of the means.
        deviation: standard deviation of the paired differences, or of the values of one arm.
        alpha: probability of a claim where there is no difference.
        comparisons: number of comparisons that share alpha equally, as in the first step of Holm's correction.
        pairs: whether the values come in pairs.
    """
    stats = scipy_stats()
    freedom, shift = (seeds - 1, seeds) if pairs else (2 * seeds - 2, seeds / 2)
    bound = stats.t.ppf(1 - alpha / comparisons / 2, freedom)
    centre = abs(difference) / deviation * math.sqrt(shift)
    return float(stats.nct.sf(bound, freedom, centre) + stats.nct.cdf(-bound, freedom, centre))


def seeds_needed(
    difference: float,
    deviation: float,
    *,
    power_wanted: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
    pairs: bool = True,
) -> int:
    """Returns the smallest number of seeds with which a t-test finds a difference with probability `power_wanted`.

    Args:
        difference: the least difference of interest.
        deviation: standard deviation of the paired differences, or of the values of one arm, in pilot runs.
        power_wanted: probability to find the difference.
        alpha, comparisons, pairs: arguments of [`power`].

    Raises:
        UserError: if more than 100,000 seeds are needed.
    """

    def suffices(seeds: int) -> bool:
        found = power(seeds, difference, deviation, alpha=alpha, comparisons=comparisons, pairs=pairs)
        return found >= power_wanted

    few, many = 1, 2
    while not suffices(many):
        few, many = many, 2 * many
        if many > MOST_SEEDS:
            raise UserError(f"difference is {difference}: a test of it needs over {MOST_SEEDS} seeds; raise it")
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if suffices(middle) else (middle, many)
    return many


def deviation_bound(values: Sequence[float], level: float = 0.8) -> float:
    """Returns an upper confidence limit of the standard deviation of which `values` are a sample.

    A plan from a few pilot runs should use the limit: the sample's own deviation is too low in half of all pilots.

    Args:
        values: at least 2 numbers with a normal distribution.
        level: probability that the limit is above the true standard deviation.
    """
    freedom = len(values) - 1
    return statistics.stdev(values) * math.sqrt(freedom / float(scipy_stats().chi2.ppf(1 - level, freedom)))


class Ranking(NamedTuple):
    """Holds the places of arms, lowest mean first, with simultaneous 95% confidence intervals.

    Attributes:
        first, last: lowest and highest place that each arm may have, by arm; place 1 has the lowest mean.
        least_difference: least difference of two means at which the arms are told apart.
        deviation: standard deviation of a value, without the effects of arm and seed.
        spread_p_value: p-value of "the deviation is equal in all arms" (Brown-Forsythe); the ranking assumes it.
    """

    first: dict[str, int]
    last: dict[str, int]
    least_difference: float
    deviation: float
    spread_p_value: float


def ranking(values: Mapping[str, Sequence[float]], level: float = 0.95) -> Ranking:
    """Ranks arms by their means over paired seeds; all pairs are compared by Tukey's test in a randomised block design.

    An arm's lowest place is 1 plus the number of arms that are below it, the highest place is the number of arms minus
    those above it (Al Mohamad, Goeman, van Zwet, arXiv:1708.02428). With probability `level` all intervals hold at once.

    Args:
        values: values of each arm, at least 2 arms with at least 2 seeds; entries at one place have one seed.
        level: probability that no two equal arms are told apart.
    """
    names, blocks = list(values), _blocks(values.values())
    arms, seeds = blocks.residuals.shape
    least = _range_quantile(level, arms, blocks.freedom) * blocks.deviation / math.sqrt(seeds)
    below = blocks.means[:, None] + least < blocks.means  # (arms, arms): whether the row's arm is below the column's
    return Ranking(
        first=dict(zip(names, (1 + below.sum(axis=0)).tolist(), strict=True)),
        last=dict(zip(names, (arms - below.sum(axis=1)).tolist(), strict=True)),
        least_difference=least,
        deviation=blocks.deviation,
        spread_p_value=float(scipy_stats().levene(*blocks.residuals, center="median").pvalue),
    )


def against(values: Mapping[Arm, Sequence[float]], baseline: Arm, level: float = 0.95) -> dict[Arm, Difference]:
    """Compares every other arm with one arm over paired seeds, with a deviation that all arms share.

    With few seeds and many arms this finds much smaller differences than [`paired`], which estimates a deviation for
    each pair. The p-values are not adjusted for their number.

    Args:
        values: values of each arm, at least 2 arms with at least 2 seeds; entries at one place have one seed.
        baseline: the arm that is subtracted from the others.
        level: probability that one interval covers the true difference.
    """
    blocks = _blocks(values.values())
    means = dict(zip(values, blocks.means.tolist(), strict=True))
    error = blocks.deviation * math.sqrt(2 / blocks.residuals.shape[1])
    return {
        name: _difference(mean - means[baseline], error, blocks.freedom, level)
        for name, mean in means.items()
        if name != baseline
    }


class _Blocks(NamedTuple):
    # a randomised block design, whose blocks are the seeds: means (arms,), residuals (arms, seeds)
    means: np.ndarray
    residuals: np.ndarray
    deviation: float
    freedom: int


def _blocks(values: Iterable[Sequence[float]]) -> _Blocks:
    table = np.array(list(values), dtype=np.float64)  # (arms, seeds)
    means = table.mean(axis=1)
    residuals = table - means[:, None] - table.mean(axis=0) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return _Blocks(means, residuals, math.sqrt((residuals**2).sum() / freedom), freedom)


@cache
def _range_quantile(level: float, arms: int, freedom: int) -> float:
    # scipy integrates numerically, which takes a tenth of a second
    return float(scipy_stats().studentized_range.ppf(level, arms, freedom))


@dataclass(frozen=True)
class Comparison:
    """Compares a metric of two arms: mean of first minus second over paired seeds, with a 95% confidence interval."""

    metric: str
    first: str
    second: str
    mean: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def claim(self) -> str:
        """A sentence that states the difference, or that nothing can be claimed."""
        interval = f"{self.mean:+.3f} (95% interval {self.low:+.3f} to {self.high:+.3f})"
        if not self.holds:
            return f"no claim on {self.metric}, {self.first} against {self.second}: {interval}"
        return f"{self.metric} of {self.first} is {'above' if self.mean > 0 else 'below'} {self.second}: {interval}"
