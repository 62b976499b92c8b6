# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment measures how long the virtual groups of an upcycled model stay whole in training.

At the start a token is sent to all shards of a replica, because their router rows are equal. Training gives each row
its own gradient, and then nothing holds the shards together.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from modeling_moe.conversion import open_checkpoint
from modeling_moe.modeling_moe import MoEForCausalLM

from .byte_text import batches
from .continued_training import Runs, arm_model, fit, held_out_loss, one_thread
from .design import Design
from .intervals import interval
from .runs import RunsFile, run_all


ARM = "virtual groups, exact"
# standard deviations of the initial router weights: the default of upcycling, and a wide one
DEVIATIONS = (0.02, 1.0)
STEPS = (0, 1, 10, 100)
SEEDS = (1, 2, 3)
RATE = 1e-3


@dataclass(frozen=True)
class Watch:
    """Describes a run of some steps at a constant learning rate."""

    router_std: float
    steps: int
    seed: int


@dataclass(frozen=True)
class Watched:
    """Holds the result of a [`Watch`].

    Attributes:
        router_std, steps, seed: the fields of the run.
        whole: share of tokens whose experts are shards of one replica, mean over layers.
        loss: held-out loss in nats per byte.
    """

    router_std: float
    steps: int
    seed: int
    whole: float
    loss: float


def whole_share(model: MoEForCausalLM, rows: torch.Tensor, granularity: int) -> tuple[float, float]:
    """Returns the share of tokens of `rows` (R, S) int64 whose experts are shards of one replica, and the loss."""
    chosen: list[torch.Tensor] = []
    hooks = [
        block.gate.register_forward_hook(lambda router, inputs, routing: chosen.append(routing.index))
        for block in model.model.sparse_blocks()
    ]
    try:
        loss = held_out_loss(model, rows)
    finally:
        for hook in hooks:
            hook.remove()
    replicas = torch.cat(chosen) // granularity  # (layers * tokens, K)
    return (replicas == replicas[:, :1]).all(dim=1).float().mean().item(), loss


def watch(job: Watch, design: Design, folder: str) -> Watched:
    """Trains the arm of virtual groups from an initial router of the job, and measures it."""
    options: dict[str, Any] = {**(design.arms[ARM] or {}), "router_std": job.router_std}
    design = replace(design, arms={ARM: options}, training=replace(design.training, warmup=0.0, last_rate=1.0))
    training = design.training
    order = batches(design.text.training, training.length, training.batch_size, training.seed, "arms", job.seed)
    with one_thread():
        torch.manual_seed(job.seed)
        model = arm_model(design, ARM, open_checkpoint(folder, None, "float32").state, job.seed)
        fit(model, order, job.steps, RATE, training)
        whole, loss = whole_share(model, design.text.rates, options["granularity"])
    return Watched(**asdict(job), whole=whole, loss=loss)


def watch_all(design: Design, runs: Runs, path: str) -> list[Watched]:
    """Executes the runs that are not in the file `path` yet, and returns all of them.

    Raises:
        UserError: if the file holds runs of another design.
    """
    file = RunsFile(path, design.of_runs | {"options": design.arms[ARM], "rate": RATE})
    found = {Watch(run.router_std, run.steps, run.seed): run for run in file.read(lambda run: Watched(**run))}
    jobs = [Watch(deviation, steps, seed) for deviation in DEVIATIONS for steps in STEPS for seed in SEEDS]

    def finish(run: Watched) -> None:
        found[Watch(run.router_std, run.steps, run.seed)] = run
        file.add(asdict(run))

    if missing := [job for job in jobs if job not in found]:
        folder = str(runs.dense_folder())
        run_all([(job, design, folder) for job in missing], watch, 1, finish, file, "virtual groups")
    return [found[job] for job in jobs]


def report(watched: Sequence[Watched]) -> str:
    """Returns a table in GitHub Markdown: whole groups and loss over the steps, means with intervals over seeds."""
    lines = ["| router's standard deviation | steps | tokens sent to one replica | loss |", "|---:|---:|---:|---:|"]
    for deviation, steps in sorted({(run.router_std, run.steps) for run in watched}):
        runs = [run for run in watched if (run.router_std, run.steps) == (deviation, steps)]
        whole, loss = interval([run.whole for run in runs]), interval([run.loss for run in runs])
        shares = f"{whole.mean:.1%} ({whole.low:.1%} to {whole.high:.1%})"
        lines.append(f"| {deviation:g} | {steps} | {shares} | {loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f}) |")
    return "\n".join(lines)
