# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment measures what a model forgets of its first domains when it learns another, with and without new experts.

A seed chooses four domains A and one domain B. A model is trained on A, and then, in each arm, on B.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.monitoring import expert_drift
from modeling_moe.resizing.growth import GrowthOptions, grow, release_experts
from modeling_moe.training import freeze_experts
from modeling_moe.utils.errors import UserError

from .files import refuse_missing_folders
from .intervals import Difference, holm, paired
from .runs import RunsFile, run_all
from .small_models import CONFIG, means, mixed_rows, new_model, one_thread, rows_of, train
from .text_domains import DOMAINS, domain_bytes


FIRST_DOMAINS = 4
OLD = range(CONFIG["num_experts"])


class Arm(NamedTuple):
    """Says how the model learns domain B.

    Attributes:
        grows: whether the layers get new experts first.
        frozen: nothing, the old experts, or everything but the new experts and their router rows.
    """

    grows: bool
    frozen: str


ARMS = {
    "all weights": Arm(False, "nothing"),
    "old experts frozen": Arm(False, "experts"),
    "grown": Arm(True, "nothing"),
    "grown, old experts frozen": Arm(True, "experts"),
    "grown, new experts alone": Arm(True, "rest"),
}
PAIRS = (
    ("old experts frozen", "all weights"),
    ("grown", "all weights"),
    ("grown, old experts frozen", "all weights"),
    ("grown, old experts frozen", "old experts frozen"),
    ("grown, old experts frozen", "grown"),
    ("grown, new experts alone", "all weights"),
)
# attribute of a run -> title
METRICS = {"forgetting": "forgetting of A", "loss_b": "loss on B"}


@dataclass
class DriftArguments:
    """These arguments set the length of the training and the number of seeds."""

    seeds: int = field(default=8, metadata={"help": "number of seeds, each with other weights and other domains"})
    steps: int = field(default=500, metadata={"help": "number of steps on the first domains"})
    later_steps: int = field(default=200, metadata={"help": "number of steps on the later domain"})
    rows: int = field(default=8, metadata={"help": "number of rows in a step"})
    length: int = field(default=128, metadata={"help": "number of tokens (bytes) in a row"})
    new_experts: int = field(default=4, metadata={"help": "number of experts that a layer with 8 gets"})
    learning_rate: float = field(default=3e-3, metadata={"help": "learning rate of AdamW on the first domains"})
    later_learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of AdamW on the later domain"})
    held_out_rows: int = field(default=32, metadata={"help": "number of held-out rows of each domain"})
    workers: int = field(default=1, metadata={"help": "number of runs at a time, each on one thread"})
    runs_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file that keeps finished runs, which are not repeated"}
    )
    markdown: str | None = field(default=None, metadata={"help": "file for the tables in Markdown"})

    def __post_init__(self):
        for name in ("steps", "later_steps", "rows", "new_experts", "held_out_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.seeds < 2:
            raise UserError(f"seeds is {self.seeds}: an interval needs at least 2")
        refuse_missing_folders(self, "runs_file", "markdown")


@dataclass(frozen=True)
class Figures:
    """Holds what one arm of a seed has done to the model.

    Attributes:
        forgetting: rise of the loss on the domains A, in nats per byte.
        loss_b: loss on domain B, in nats per byte.
        weight_change: relative change of the old experts' weights.
        output_change: relative change of the old experts' outputs for equal inputs of the domains A.
        rerouted: share of the assignments of A's tokens that are not made any more.
        new_share_a: share of A's assignments that go to new experts.
        new_share_b: share of B's assignments that go to new experts.
        released: rise of the loss on A when new experts are released, before any training; 0 without new experts.
    """

    forgetting: float
    loss_b: float
    weight_change: float
    output_change: float
    rerouted: float
    new_share_a: float
    new_share_b: float
    released: float


@dataclass(frozen=True)
class Run:
    """Holds the figures of all arms for one seed, and the names of the domains."""

    seed: int
    first: list[str]
    later: str
    loss_a: float
    loss_b: float
    arms: dict[str, Figures]


def grown(model: MoEForCausalLM, new_experts: int, seed: int) -> MoEForCausalLM:
    """Returns a copy of the model with new experts, copies of old ones with noise, that tokens can choose."""
    state = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    total = len(OLD) + new_experts
    tensors, config = grow(state, model.config, GrowthOptions(mode="masked", num_experts=total, seed=seed))
    larger = MoEForCausalLM(config)
    larger.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    release_experts(larger, range(len(OLD), total))
    return larger


def learn(model: MoEForCausalLM, arm: Arm, text: np.ndarray, args: DriftArguments, seed: int) -> None:
    """Trains a model on domain B as the arm says."""
    if arm.frozen == "rest":
        model.requires_grad_(False)
        for block in model.model.sparse_blocks():
            block.experts.requires_grad_(True)
            block.gate.requires_grad_(True)
    frozen = None if arm.frozen == "nothing" else freeze_experts(model, OLD, router=arm.frozen == "rest")
    after_step: Callable[[], None] | None = None if frozen is None else frozen.restore
    batches = mixed_rows([text], args.rows, args.length, args.later_steps, np.random.default_rng((seed, 2)))
    train(model, batches, args.later_learning_rate, after_step=after_step)


def run_seed(seed: int, args: DriftArguments) -> Run:
    """Trains all arms of a seed, on one thread."""
    with one_thread():
        rng = np.random.default_rng(seed)
        *first, later = [list(DOMAINS)[i] for i in rng.permutation(len(DOMAINS))[: FIRST_DOMAINS + 1]]
        before = new_model(seed)
        texts = [domain_bytes(domain)[0] for domain in first]
        train(before, mixed_rows(texts, args.rows, args.length, args.steps, rng), args.learning_rate)
        held_out = {
            domain: [{"input_ids": rows_of(domain_bytes(domain)[1], args.held_out_rows, args.length, rng)}]
            for domain in (*first, later)
        }
        arms, losses = {}, dict.fromkeys(held_out, float("nan"))
        for name, arm in ARMS.items():
            model, released = copy.deepcopy(before), 0.0
            if arm.grows:
                model = grown(before, args.new_experts, seed)
                start = expert_drift(before, model, held_out).forgetting
                released = means({domain: start[domain] for domain in first})
            torch.manual_seed(seed)
            learn(model, arm, domain_bytes(later)[0], args, seed)
            drift = expert_drift(before, model, held_out)
            losses = drift.loss_before
            arms[name] = Figures(
                forgetting=means({domain: drift.forgetting[domain] for domain in first}),
                loss_b=drift.loss_after[later],
                weight_change=drift.mean("weight_change"),
                output_change=means({domain: drift.mean("output_change", domain) for domain in first}),
                rerouted=means({domain: drift.mean("rerouted", domain) for domain in first}),
                new_share_a=means({domain: drift.mean("new_share", domain) for domain in first}),
                new_share_b=drift.mean("new_share", later),
                released=released,
            )
        return Run(seed, first, later, means({d: losses[d] for d in first}), losses[later], arms)


def compare(args: DriftArguments) -> list[Run]:
    """Trains the seeds that the runs file lacks, and returns all."""
    free = ("seeds", "workers", "runs_file", "markdown")
    file = RunsFile(args.runs_file, {name: value for name, value in asdict(args).items() if name not in free})

    def make(run: dict) -> Run:
        return Run(**(run | {"arms": {name: Figures(**figures) for name, figures in run["arms"].items()}}))

    done = {run.seed: run for run in file.read(make)}

    def finish(run: Run) -> None:
        done[run.seed] = run
        file.add(asdict(run))

    missing = [(seed, args) for seed in range(args.seeds) if seed not in done]
    run_all(missing, run_seed, args.workers, finish, file, "seeds")
    return [done[seed] for seed in range(args.seeds)]


def comparisons(runs: Sequence[Run]) -> list[tuple[str, str, str, Difference, float]]:
    """Returns metric, arms, paired difference and p-value of each comparison; p-values are adjusted by Holm's method."""
    names, found = [], []
    for metric in METRICS:
        values = {arm: [getattr(run.arms[arm], metric) for run in runs] for arm in ARMS}
        for first, second in PAIRS:
            names.append((metric, first, second))
            found.append(paired(values[first], values[second]))
    adjusted = holm([difference.p_value for difference in found])
    return [(*name, difference, p) for name, difference, p in zip(names, found, adjusted, strict=True)]


def mean_of(runs: Sequence[Run], arm: str, name: str) -> float:
    """Returns the mean over seeds of an attribute of [`Figures`]."""
    return sum(getattr(run.arms[arm], name) for run in runs) / len(runs)


def markdown(runs: Sequence[Run]) -> str:
    """Returns the tables in GitHub Markdown."""
    lines = [
        "| arm | forgetting of A | of this by the release | loss on B | change of old weights | of old outputs | re-routed | "
        "to new experts, A | B |",
        "|---|" + "---:|" * 8,
    ]
    for arm in ARMS:
        value = {name: mean_of(runs, arm, name) for name in Figures.__dataclass_fields__}
        shares = (
            f"{value[name]:.0%}"
            for name in ("weight_change", "output_change", "rerouted", "new_share_a", "new_share_b")
        )
        row = [arm, f"{value['forgetting']:+.3f}", f"{value['released']:+.3f}", f"{value['loss_b']:.3f}", *shares]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| metric | arm | minus arm | difference, 95 % interval | adjusted p |", "|---|---|---|---:|---:|"]
    for metric, first, second, difference, p_value in comparisons(runs):
        shown = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
        lines.append(f"| {METRICS[metric]} | {first} | {second} | {shown} | {p_value:.2g} |")
    return "\n".join(lines) + "\n"
