# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the learning rate of each arm; a grid is extended while an arm prefers its edge."""

import statistics
from collections.abc import Sequence

from modeling_moe.utils.errors import UserError

from .continued_training import Job, Runs
from .design import Search


def next_rates(losses: dict[float, float], search: Search, arm: str) -> list[float]:
    """Returns the learning rates to try next: none if the best rate has a worse one on each side.

    Args:
        losses: mean loss of each rate tried; a run that diverged has a loss that is not finite.
        search: how rates are found.
        arm: name of the arm for messages.

    Raises:
        UserError: if the best rate is at the edge although `search.most` rates were tried.
    """
    best = best_rate(losses)
    edges = {min(losses): best / search.factor, max(losses): best * search.factor}
    if best not in edges:
        return []
    if len(losses) >= search.most:
        raise UserError(f"arm {arm!r} prefers the edge {best:g} of {len(losses)} learning rates: raise search.most")
    return [float(f"{edges[best]:.6g}")]


def best_rate(losses: dict[float, float]) -> float:
    """Returns the learning rate with the lowest loss; NaN counts as infinite."""
    return min(losses, key=lambda rate: losses[rate] if losses[rate] == losses[rate] else float("inf"))


def find_rates(runs: Runs, arms: Sequence[str], search: Search) -> dict[str, dict[float, float]]:
    """Tries learning rates until every arm's best is inside its grid.

    Returns:
        The mean loss of each rate tried, by arm, rates in ascending order.
    """
    found: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    waiting = dict.fromkeys(arms, search.rates)
    while waiting:
        jobs = [Job(arm, seed, rate) for arm, rates in waiting.items() for rate in rates for seed in search.seeds]
        done = {run.job: run.rate_loss for run in runs.of(jobs, "learning rates")}
        for arm, rates in waiting.items():
            for rate in rates:
                found[arm][rate] = statistics.fmean(done[Job(arm, seed, rate)] for seed in search.seeds)
        more = {arm: next_rates(found[arm], search, arm) for arm in waiting}
        waiting = {arm: rates for arm, rates in more.items() if rates}
    return {arm: dict(sorted(losses.items())) for arm, losses in found.items()}
