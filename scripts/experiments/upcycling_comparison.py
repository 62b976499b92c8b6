# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment decides which way of upcycling learns more at equal compute, by rules fixed before the first run.

Search runs find each arm's learning rate, pilot runs find the spread between seeds, the spread gives the number of
seeds, and only then the compared runs are trained, with other seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .continued_training import Job, Run, Runs
from .design import Design, Rules
from .intervals import Difference, holm, interval, paired, power, seeds_needed
from .rate_search import best_rate, find_rates


class Plan(NamedTuple):
    """Holds the number of seeds, and why.

    Attributes:
        deviation: largest standard deviation of the pairs' differences between pilot seeds.
        needed: number of seeds that gives the power of the rules.
        seeds: number of seeds of the comparison: `needed` within the bounds of the rules.
        power: probability to find the smallest difference of interest with these seeds, in the first step of Holm's
            correction.
    """

    deviation: float
    needed: int
    seeds: int
    power: float


class Verdict(NamedTuple):
    """Holds the comparison of a pair: the difference of the losses, first minus second, and what it allows to say."""

    first: str
    second: str
    difference: Difference
    adjusted_p_value: float
    claim: str


class Comparison(NamedTuple):
    """Holds the result: the rates tried by arm, the rates chosen, the plan, the compared runs by arm, the verdicts."""

    tried: dict[str, dict[float, float]]
    rates: dict[str, float]
    plan: Plan
    runs: dict[str, list[Run]]
    verdicts: list[Verdict]


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs by arm, each in the order of the seeds."""
    grouped: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        grouped.setdefault(run.arm, []).append(run)
    return grouped


def losses(runs: Sequence[Run]) -> list[float]:
    """Returns the test losses."""
    return [run.test_loss for run in runs]


def plan_seeds(pilots: Mapping[str, Sequence[float]], rules: Rules) -> Plan:
    """Computes the number of seeds from the test losses of the pilot runs by arm, entries with equal seeds paired."""
    deviation = max(
        statistics.stdev(a - b for a, b in zip(pilots[first], pilots[second], strict=True))
        for first, second in rules.pairs
    )
    test = {"alpha": rules.alpha, "comparisons": len(rules.pairs)}
    needed = seeds_needed(rules.smallest_difference, deviation, power_wanted=rules.power, **test)
    seeds = min(max(needed, rules.least_seeds), rules.most_seeds)
    return Plan(deviation, needed, seeds, power(seeds, rules.smallest_difference, deviation, **test))


def judge(values: Mapping[str, Sequence[float]], rules: Rules) -> list[Verdict]:
    """Compares the pairs of the rules by test losses by arm, entries with equal seeds paired."""
    differences = [paired(values[first], values[second]) for first, second in rules.pairs]
    adjusted = holm([difference.p_value for difference in differences])
    return [
        Verdict(first, second, difference, p_value, claim_of(first, second, difference, p_value, rules))
        for (first, second), difference, p_value in zip(rules.pairs, differences, adjusted, strict=True)
    ]


def claim_of(first: str, second: str, difference: Difference, adjusted: float, rules: Rules) -> str:
    """Returns the sentence that the rules allow: which loss is lower, that they hardly differ, or that it is open."""
    small = max(abs(difference.low), abs(difference.high)) < rules.smallest_difference
    if adjusted < rules.alpha:
        better, worse = (first, second) if difference.mean < 0 else (second, first)
        return f"{better} has a lower loss than {worse}" + (", by less than is of interest" if small else "")
    if small:
        return f"{first} and {second} differ by less than {rules.smallest_difference:g}"
    return f"undecided between {first} and {second}"


def compare(design: Design, runs: Runs) -> Comparison:
    """Executes the design; the compared runs are looked at when all of them are finished.

    Raises:
        UserError: if an arm has no best learning rate inside its grid, or a run cannot be executed.
    """
    rules = design.comparison
    tried = find_rates(runs, rules.arms, design.search)
    rates = {arm: best_rate(found) for arm, found in tried.items()}

    def trained(seeds: Sequence[int], desc: str) -> dict[str, list[Run]]:
        return by_arm(runs.of([Job(arm, seed, rates[arm]) for seed in seeds for arm in rules.arms], desc))

    pilots = trained(rules.pilot_seeds, "pilot")
    plan = plan_seeds({arm: losses(found) for arm, found in pilots.items()}, rules)
    compared = trained(range(1, plan.seeds + 1), "compared runs")
    verdicts = judge({arm: losses(found) for arm, found in compared.items()}, rules)
    return Comparison(tried, rates, plan, compared, verdicts)


def report(design: Design, result: Comparison) -> str:
    """Returns the result in GitHub Markdown: a table of the arms, the verdicts, and how the seeds were planned."""
    return "\n".join(
        ["\n".join(_arms_table(design, result)), "", *_verdicts_table(result), "", _planned(design.comparison, result)]
    )


def _arms_table(design: Design, result: Comparison) -> list[str]:
    dense = next(iter(result.runs))
    lines = [
        "| arm | parameters | FLOPs of a token | steps | rate (of those tried) | loss before | after | minus dense |"
    ]
    lines.append("|---" + "|---:" * 7 + "|")
    for arm, runs in result.runs.items():
        flops = design.flops(arm) / design.flops(dense)
        rates = f"{result.rates[arm]:g} ({min(result.tried[arm]):g} to {max(result.tried[arm]):g})"
        before = statistics.fmean(run.initial_loss for run in runs)
        after = f"{statistics.fmean(losses(runs)):.4f}"
        against = "" if arm == dense else _signed(interval(_differences(runs, result.runs[dense])))
        cells = [arm, f"{design.config(arm).num_params():,}", f"{flops:.2f}x", f"{runs[0].steps}", rates]
        lines.append(f"| {' | '.join([*cells, f'{before:.4f}', after, against])} |")
    return lines


def _differences(first: Sequence[Run], second: Sequence[Run]) -> list[float]:
    return [a - b for a, b in zip(losses(first), losses(second), strict=True)]


def _signed(found: tuple[float, ...]) -> str:
    mean, low, high, *_ = found
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def _verdicts_table(result: Comparison) -> list[str]:
    lines = ["| first | second | first minus second | adjusted p | verdict |", "|---|---|---:|---:|---|"]
    for verdict in result.verdicts:
        cells = [verdict.first, verdict.second, _signed(verdict.difference), f"{verdict.adjusted_p_value:.2g}"]
        lines.append(f"| {' | '.join([*cells, verdict.claim])} |")
    return lines


def _planned(rules: Rules, result: Comparison) -> str:
    plan = result.plan
    return (
        f"The largest deviation of a pair between {len(rules.pilot_seeds)} pilot seeds is {plan.deviation:.4f} nats per byte. "
        f"To find a difference of {rules.smallest_difference:g} with probability {rules.power:g} takes {plan.needed} seeds; "
        f"{plan.seeds} were trained, with which the probability is {plan.power:.2f}."
    )
