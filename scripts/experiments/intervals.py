# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module computes confidence intervals of paired differences, and states what may be claimed from them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


# 97.5% quantiles of Student's t by degrees of freedom
T_QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}


class Interval(NamedTuple):
    """Holds a mean and the ends of a 95% confidence interval."""

    mean: float
    low: float
    high: float


def interval(differences: Sequence[float]) -> Interval:
    """Returns the mean of 2 to 10 numbers with a 95% confidence interval by Student's t."""
    mean = statistics.fmean(differences)
    half = T_QUANTILES[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)


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
