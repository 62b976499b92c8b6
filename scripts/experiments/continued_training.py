# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module trains one dense model on bytes, and continues it as each arm of a design: dense, or upcycled.

All parameters are trained, in fp32. An arm trains for as many steps as cost the FLOPs of the dense arm, routers
counted; arms with equal seeds read equal batches in equal order.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

from modeling_moe.checkpoints import State
from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.upcycling import UpcyclingOptions, assemble
from modeling_moe.utils import json_files
from modeling_moe.utils.errors import UserError

from .byte_text import batches
from .design import Design, Training
from .files import refuse_missing_folders
from .runs import RunsFile, run_all


ROOT = Path(__file__).resolve().parents[2]
DESIGN_FILE = ROOT / "configuration" / "upcycling_experiment.yaml"
# file in the folder of the dense model that says how it was trained
DESIGN_NAME = "design.json"
# number of sequences of an evaluation at a time
ROWS = 32


@dataclass
class RunsArguments:
    """These arguments name the design and the files of the runs."""

    design: str = field(
        default=str(DESIGN_FILE), metadata={"help": "YAML file with the design, fixed before the runs"}
    )
    runs_file: str = field(
        default=str(ROOT / "docs" / "science" / "runs" / "upcycling.jsonl"),
        metadata={"help": "JSON Lines file of finished runs; runs in the file are not repeated"},
    )
    dense_dir: str = field(
        default="outputs/upcycling_experiment/dense",
        metadata={"help": "folder of the dense model, which is trained if it is not there and a run is missing"},
    )
    workers: int = field(default=1, metadata={"help": "number of runs at a time, each on one thread"})
    markdown: str | None = field(default=None, metadata={"help": "file for the result in GitHub Markdown"})

    def __post_init__(self):
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}: it must be at least 1")
        refuse_missing_folders(self, "runs_file", "markdown")


@dataclass(frozen=True)
class Job:
    """Describes one run."""

    arm: str
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Run:
    """Holds the results of a [`Job`]. Losses are held-out, in nats per byte, without router losses.

    Attributes:
        arm, seed, learning_rate: the fields of the job.
        options: options of upcycling of the arm; None for the dense model.
        dense: hash of the dense model's weights.
        steps: number of steps.
        initial_loss: loss on the test rows before training.
        rate_loss: loss after training on the rows for the choice of the learning rate.
        test_loss: loss after training on the test rows.
        seconds: CPU time of building, training and evaluation.
    """

    arm: str
    seed: int
    learning_rate: float
    options: dict[str, Any] | None
    dense: str
    steps: int
    initial_loss: float
    rate_loss: float
    test_loss: float
    seconds: float

    @property
    def job(self) -> Job:
        """The job of the run."""
        return Job(self.arm, self.seed, self.learning_rate)


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread, on which results do not depend on the machine's number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit(model: nn.Module, order: Iterable[torch.Tensor], steps: int, rate: float, training: Training) -> None:
    """Trains all parameters with AdamW on `steps` batches (B, S) int64 of `order`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(training.warmup * steps), steps, min_lr_rate=training.last_rate
    )
    model.train()
    for _, ids in zip(range(steps), order, strict=False):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: torch.Tensor) -> float:
    """Returns the loss on rows (R, S) int64 in nats per byte, without router losses."""
    model.eval()
    losses = []
    for ids in rows.split(ROWS):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").flatten())
    return torch.cat(losses).mean().item()


def train_dense(design: Design, folder: Path) -> None:
    """Trains the dense model and saves it in `folder` as a Llama checkpoint."""
    training = design.training
    with one_thread():
        torch.manual_seed(training.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **design.model))
        order = batches(design.text.training, training.length, training.batch_size, training.seed, "dense")
        fit(model, order, training.dense_steps, training.dense_rate, training)
    model.save_pretrained(folder)
    json_files.write_json(folder / DESIGN_NAME, _of_dense(design))


def _of_dense(design: Design) -> dict[str, Any]:
    """Returns what the dense model depends on."""
    of_arms = ("steps", "rate_rows", "test_rows")
    training = {name: value for name, value in asdict(design.training).items() if name not in of_arms}
    return {"model": design.model, "training": training}


def dense_state(design: Design, folder: Path) -> State:
    """Opens the dense model.

    Raises:
        UserError: if the folder holds a model of another design.
    """
    if json.loads((folder / DESIGN_NAME).read_text("utf-8")) != _of_dense(design):
        raise UserError(f"dense_dir {folder} holds a dense model of another design: name another folder")
    return open_checkpoint(str(folder), None, "float32").state


def fingerprint(state: State) -> str:
    """Returns a hash of a model's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        digest.update(state[name].read().contiguous().numpy().tobytes())
    return digest.hexdigest()


def arm_model(design: Design, arm: str, state: State, seed: int) -> MoEForCausalLM:
    """Builds the model with which an arm starts."""
    fields, config = design.arms[arm], design.config(arm)
    if fields is not None:
        state = assemble([state], config, UpcyclingOptions(**fields, seed=seed), {})
    model = load_state(config, state)
    for parameter in model.parameters():
        # tensors may be mapped from the file
        parameter.data = parameter.data.clone()
    return model


def run_job(job: Job, design: Design, folder: str) -> Run:
    """Continues the dense model in `folder` as an arm, and measures the result."""
    began, training, text = time.process_time(), design.training, design.text
    with one_thread():
        state = dense_state(design, Path(folder))
        torch.manual_seed(job.seed)
        model = arm_model(design, job.arm, state, job.seed)
        initial = held_out_loss(model, text.test)
        order = batches(text.training, training.length, training.batch_size, training.seed, "arms", job.seed)
        fit(model, order, design.steps(job.arm), job.learning_rate, training)
        return Run(
            **asdict(job),
            options=design.arms[job.arm],
            dense=fingerprint(state),
            steps=design.steps(job.arm),
            initial_loss=initial,
            rate_loss=held_out_loss(model, text.rates),
            test_loss=held_out_loss(model, text.test),
            seconds=time.process_time() - began,
        )


class Runs:
    """Executes the runs of a design; those in the file are not repeated.

    Raises:
        UserError: if the file holds runs of another design, or of an arm with other options.
    """

    def __init__(self, design: Design, args: RunsArguments):
        self._design, self._args = design, args
        self._file = RunsFile(args.runs_file, design.of_runs)
        self._done = {run.job: run for run in self._file.read(lambda run: Run(**run))}
        for run in self._done.values():
            if run.arm in design.arms and run.options != design.arms[run.arm]:
                raise UserError(
                    f"runs_file {args.runs_file} holds runs of arm {run.arm!r} with other options: name the arm differently"
                )

    def of(self, jobs: Sequence[Job], desc: str) -> list[Run]:
        """Returns the runs of the jobs in their order; executes those that are missing.

        Raises:
            UserError: if a run is missing, and the runs in the file start from another dense model.
        """
        if missing := [job for job in jobs if job not in self._done]:
            folder = self.dense_folder()
            work = [(job, self._design, str(folder)) for job in missing]
            run_all(work, run_job, self._args.workers, self._finish, self._file, desc)
        return [self._done[job] for job in jobs]

    def _finish(self, run: Run) -> None:
        self._done[run.job] = run
        self._file.add(asdict(run))

    def dense_folder(self) -> Path:
        """Returns the folder of the dense model, which is trained if it is not there.

        Raises:
            UserError: if the runs in the file start from another dense model.
        """
        folder = Path(self._args.dense_dir)
        if not (folder / DESIGN_NAME).is_file():
            train_dense(self._design, folder)
        found = fingerprint(dense_state(self._design, folder))
        if any(run.dense != found for run in self._done.values()):
            raise UserError(
                f"runs_file {self._args.runs_file} holds runs that start from another dense model than the one in {folder}, "
                "whose training is reproducible on one kind of machine only: name another runs_file"
            )
        return folder
