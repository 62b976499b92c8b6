# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment measures what more experts cost and buy: one dense model, upcycled with equal active networks.

# P points, each a number of experts; D seeds
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.utils.errors import UserError

from .byte_text import batches
from .continued_training import Job, Run, Runs, arm_model, dense_state, one_thread
from .design import Design
from .intervals import Interval, interval
from .rate_search import best_rate, find_rates
from .runs import RunsFile
from .upcycling_comparison import by_arm, losses


@dataclass(frozen=True)
class Cost:
    """Holds what a step of an arm costs on one thread.

    Attributes:
        arm: name of the arm.
        step_seconds: median CPU time of a training step; the arms take turns.
        model_bytes: size of weights, gradients and AdamW's two moments, in fp32.
        kept_bytes: size of the tensors kept for the backward pass, see [`kept_bytes`].
    """

    arm: str
    step_seconds: float
    model_bytes: int
    kept_bytes: int

    @property
    def training_bytes(self) -> int:
        """Memory of a training step in bytes."""
        return self.model_bytes + self.kept_bytes


class Law(NamedTuple):
    """Describes a law of the gain over the dense model.

    Attributes:
        formula: formula for readers, with the names of the coefficients.
        names: names of the coefficients.
        gain: function of experts (P,), parameters relative to the dense model (P,) and the coefficients, to (P,).
        start: coefficients with which the fit starts.
        bounds: lowest and highest coefficients.
    """

    formula: str
    names: tuple[str, ...]
    gain: Callable[..., np.ndarray]
    start: tuple[float, ...]
    bounds: tuple[tuple[float, ...], tuple[float, ...]]


LAWS = {
    "logarithm": Law(
        "a + b ln E",
        ("a", "b"),
        lambda experts, parameters, a, b: a + b * np.log(experts),
        (0.0, 0.01),
        ((-np.inf, -np.inf), (np.inf, np.inf)),
    ),
    "power law": Law(
        "g - c N^-p",
        ("g", "c", "p"),
        lambda experts, parameters, limit, scale, exponent: limit - scale * parameters**-exponent,
        (0.05, 0.05, 0.5),
        ((-10.0, -10.0, 0.01), (10.0, 10.0, 4.0)),
    ),
}


class Fit(NamedTuple):
    """Holds a law fitted to the mean gains.

    Attributes:
        values: coefficients, each with a 95% interval by the jackknife over seeds.
        grid: numbers of experts of the curve.
        curve: gain at each of them, with its 95% interval.
        residual: root of the mean squared residual, in nats per byte.
        left_out: root of the mean squared error of the gain at each number of experts, predicted from the others.
        largest: predicted minus measured gain at the largest number of experts, predicted from the others.
    """

    values: dict[str, Interval]
    grid: list[float]
    curve: list[Interval]
    residual: float
    left_out: float
    largest: float


class Points(NamedTuple):
    """Holds what is fitted: experts (P,), parameters relative to the dense model (P,), gains (D, P)."""

    experts: np.ndarray
    parameters: np.ndarray
    gains: np.ndarray


def coefficients(law: Law, experts: np.ndarray, parameters: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Fits a law to gains (P,) by least squares.

    Raises:
        UserError: if scipy is not installed.
    """
    try:
        from scipy.optimize import curve_fit
    except ImportError as error:
        raise UserError("the fit needs scipy: pip install 'modeling-moe[science]'") from error
    at = np.stack([experts, parameters])
    found, *_ = curve_fit(
        lambda at, *values: law.gain(*at, *values), at, gains, law.start, bounds=law.bounds, maxfev=20_000
    )
    return found


def jackknife(full: float, left_out: Sequence[float]) -> Interval:
    """Returns an estimate with a 95% interval from the estimates without one seed each, by Student's t.

    The pseudo-values D * full - (D - 1) * left_out are treated as independent values (Tukey 1958).
    """
    count = len(left_out)
    spread = interval([count * full - (count - 1) * value for value in left_out])
    half = spread.high - spread.mean
    return Interval(full, full - half, full + half)


def fit_law(law: Law, points: Points, grid: Sequence[float]) -> Fit:
    """Fits a law to the mean gains over seeds; intervals come from leaving out each seed in turn.

    Args:
        law: the law.
        points: measurements; parameters between two points are interpolated in proportion to the experts.
        grid: numbers of experts at which the curve is computed.
    """
    experts, parameters, gains = points
    mean = gains.mean(axis=0)
    rest = [np.delete(gains, seed, axis=0).mean(axis=0) for seed in range(len(gains))]
    full, parts = (
        coefficients(law, experts, parameters, mean),
        [coefficients(law, experts, parameters, g) for g in rest],
    )
    at = np.asarray(grid), np.interp(grid, experts, parameters)
    curves = np.stack([law.gain(*at, *found) for found in (full, *parts)])  # (1 + D, grid)
    errors = left_out_errors(law, experts, parameters, mean)
    return Fit(
        {name: jackknife(full[place], [found[place] for found in parts]) for place, name in enumerate(law.names)},
        list(grid),
        [jackknife(column[0], column[1:].tolist()) for column in curves.T],
        float(np.sqrt(np.mean((law.gain(experts, parameters, *full) - mean) ** 2))),
        float(np.sqrt(np.mean(np.square(errors)))),
        errors[-1],
    )


def left_out_errors(law: Law, experts: np.ndarray, parameters: np.ndarray, mean: np.ndarray) -> list[float]:
    """Returns predicted minus measured gain at each point, predicted by a fit to the other points."""
    errors = []
    for place in range(len(experts)):
        others = [np.delete(values, place) for values in (experts, parameters, mean)]
        here = slice(place, place + 1)
        found = law.gain(experts[here], parameters[here], *coefficients(law, *others))
        errors.append(float(found[0] - mean[place]))
    return errors


def step_seconds(models: dict[str, MoEForCausalLM], order: Iterable[torch.Tensor], steps: int) -> dict[str, float]:
    """Returns the median CPU time of a training step of each model; the models take turns on each batch of `order`."""
    optimizers = {arm: torch.optim.AdamW(model.parameters(), fused=True) for arm, model in models.items()}
    times: dict[str, list[float]] = {arm: [] for arm in models}
    for number, ids in zip(range(1 + steps), order, strict=False):
        for arm, model in models.items():
            began = time.process_time()
            model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizers[arm].step()
            optimizers[arm].zero_grad()
            if number:  # the first step allocates
                times[arm].append(time.process_time() - began)
    return {arm: statistics.median(values) for arm, values in times.items()}


def kept_bytes(model: MoEForCausalLM, ids: torch.Tensor) -> int:
    """Returns the size of the tensors that the forward pass on `ids` (B, S) keeps for the backward pass, without
    parameters; a storage that several of them share is counted once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    return sum(kept.values())


def measure_costs(design: Design, runs: Runs, arms: Sequence[str], path: str) -> dict[str, Cost]:
    """Measures the cost of each arm in one run, or reads the costs from the file `path` of an earlier run.

    Raises:
        UserError: if the file holds costs of another design.
    """
    file = RunsFile(path, design.of_runs)
    found = {cost.arm: cost for cost in file.read(lambda cost: Cost(**cost))}
    if not set(arms) <= set(found):
        training, state = design.training, dense_state(design, runs.dense_folder())
        order = batches(design.text.training, training.length, training.batch_size, training.seed, "costs")
        with one_thread():
            models = {arm: arm_model(design, arm, state, training.seed) for arm in arms}
            seconds, ids = step_seconds(models, order, design.growth.cost_steps), next(order)
            sizes = {arm: sum(parameter.nbytes for parameter in model.parameters()) for arm, model in models.items()}
            costs = [Cost(arm, seconds[arm], 4 * sizes[arm], kept_bytes(models[arm], ids)) for arm in arms]
        for cost in costs:
            file.add(asdict(cost))
        found = {cost.arm: cost for cost in costs}
    return found


class GrowthResult(NamedTuple):
    """Holds the result; the first arm continues the dense model, the others have more and more experts.

    Attributes:
        rates: learning rate by arm.
        runs: runs by arm, in the order of the seeds.
        experts: number of experts by upcycled arm.
        parameters: number of parameters relative to the dense model, by upcycled arm.
        gains: loss of the dense arm minus loss, by upcycled arm, with the interval over paired seeds.
        costs: cost of a step by arm.
        fits: fit of each law in `LAWS`.
    """

    rates: dict[str, float]
    runs: dict[str, list[Run]]
    experts: dict[str, int]
    parameters: dict[str, float]
    gains: dict[str, Interval]
    costs: dict[str, Cost]
    fits: dict[str, Fit]


def grow(design: Design, runs: Runs, costs_file: str) -> GrowthResult:
    """Trains all arms with all seeds, measures the costs, and fits the laws.

    Raises:
        UserError: if an arm has no best learning rate inside its grid, or a run cannot be executed.
    """
    growth = design.growth
    arms = [growth.dense, *growth.arms]
    rates = {arm: best_rate(found) for arm, found in find_rates(runs, arms, design.search).items()}
    seeds = range(1, growth.seeds + 1)
    trained = by_arm(runs.of([Job(arm, seed, rates[arm]) for seed in seeds for arm in arms], "runs"))
    costs = measure_costs(design, runs, arms, costs_file)
    experts = {arm: design.config(arm).num_experts for arm in growth.arms}
    parameters = {arm: design.config(arm).num_params() / design.dense_config.num_params() for arm in growth.arms}
    dense = losses(trained[growth.dense])
    differences = {arm: [a - b for a, b in zip(dense, losses(trained[arm]), strict=True)] for arm in growth.arms}
    points = Points(
        np.array(list(experts.values()), dtype=np.float64),
        np.array(list(parameters.values())),
        np.array(list(differences.values())).T,
    )
    grid = np.geomspace(points.experts.min(), points.experts.max(), 41).tolist()
    return GrowthResult(
        rates=rates,
        runs=trained,
        experts=experts,
        parameters=parameters,
        gains={arm: interval(values) for arm, values in differences.items()},
        costs=costs,
        fits={name: fit_law(law, points, grid) for name, law in LAWS.items()},
    )
