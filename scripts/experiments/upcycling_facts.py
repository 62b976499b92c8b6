# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment measures whether more experts learn more at equal compute: dense and upcycled models learn facts.

The states that enter the last layers are computed once. Only the feed-forward networks and routers of these layers
are trained, in fp32, on facts (a name, six random digits) and prose. The head has only the tokens of this data, so
that losses are lower than those of the full head, in all arms alike.

# N facts, M tokens of a fact, S = facts_per_row * M tokens of a row, H hidden, V tokens in the data
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from modeling_moe.checkpoints import LazyTensor, State
from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.upcycling.assembly import assemble
from modeling_moe.upcycling.options import UpcyclingOptions
from modeling_moe.upcycling.plan import sparse_config
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_tokenizer
from modeling_moe.utils.seeds import generator_for

from .facts_data import (
    DIGITS,
    FactsData,
    Rows,
    entering_states,
    make_facts,
    positions,
    prose_rows,
    shuffled,
    tail_model,
)
from .files import refuse_missing_folders
from .intervals import Comparison, interval
from .runs import RunsFile, run_all
from .upcycling_initial_loss import with_own_rows


# share of the steps in which the learning rate rises
WARMUP = 0.1
_VG = {"num_experts": 16, "granularity": 4, "num_experts_per_tok": 4}

# arm -> options of upcycling; None trains the dense networks
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "virtual groups, exact": _VG,
    "virtual groups, Megatron": _VG | {"scaling": "megatron"},
    "drop .5": _VG | {"method": "drop", "drop_ratio": 0.5},
    # a token uses 1 + 2 / 16 of the dense width, so that the arm has fewer steps; each shard has its own router row
    "drop .1 and shared expert": {
        "method": "drop",
        "drop_ratio": 0.1,
        "shared_expert": True,
        "num_experts": 64,
        "granularity": 16,
        "num_experts_per_tok": 2,
    },
}
# arms in which each shard has its own row in the router
OWN_ROWS = ("drop .1 and shared expert",)
# pairs of arms that are compared
PAIRS = (
    *((arm, "dense") for arm in ARMS if arm != "dense"),
    ("virtual groups, exact", "virtual groups, Megatron"),
    ("virtual groups, exact", "drop .5"),
    ("virtual groups, exact", "drop .1 and shared expert"),
    ("virtual groups, Megatron", "drop .5"),
)
METRICS = ("recall_bits", "exact_match", "prose_loss")
# arguments that do not change a run
FREE_ARGUMENTS = ("rates", "seeds", "only", "workers", "runs_file", "output_json", "trust_remote_code")


@dataclass
class FactsArguments:
    """These arguments name the model, the amount of data, and the length of the training."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a dense model"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    layers: int = field(default=4, metadata={"help": "number of last layers whose feed-forward networks are trained"})
    facts: int = field(default=512, metadata={"help": "number of facts to learn; each seed has different facts"})
    facts_per_row: int = field(
        default=8, metadata={"help": "number of facts in a row; they do not attend to each other"}
    )
    fact_rows: int = field(default=4, metadata={"help": "number of rows of facts in a step"})
    prose_rows: int = field(default=2, metadata={"help": "number of rows of prose in a step"})
    prose_pool: int = field(default=384, metadata={"help": "number of rows of prose to train on"})
    held_out_rows: int = field(default=40, metadata={"help": "number of rows of held-out prose"})
    steps: int = field(
        default=190,
        metadata={"help": "number of optimizer steps of a run; fewer for arms with more compute per token"},
    )
    sweep_steps: int = field(
        default=60, metadata={"help": "number of steps of the short runs that find an arm's learning rate"}
    )
    rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "learning rates of AdamW to choose from"}
    )
    seeds: int = field(default=3, metadata={"help": "number of runs of each arm, each with another seed"})
    only: list[str] | None = field(default=None, metadata={"help": "names of the arms to train; all arms without it"})
    seed: int = field(default=0, metadata={"help": "seed of facts, order and all other random numbers"})
    workers: int = field(default=1, metadata={"help": "number of runs at a time, each on one thread"})
    runs_file: str | None = field(
        default=None,
        metadata={"help": "JSON Lines file with one line for each finished run; runs in the file are not repeated"},
    )
    output_json: str | None = field(default=None, metadata={"help": "file for the results"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code from the checkpoint"})

    def __post_init__(self):
        names = (
            "layers",
            "facts_per_row",
            "fact_rows",
            "prose_rows",
            "held_out_rows",
            "steps",
            "sweep_steps",
            "workers",
        )
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.seeds < 2:
            raise UserError(f"seeds is {self.seeds}: it must be at least 2 to compute an interval")
        for name, rows in {"facts": self.fact_rows * self.facts_per_row, "prose_pool": self.prose_rows}.items():
            if getattr(self, name) < rows:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {rows}, which a step reads")
        if not self.rates or min(self.rates) <= 0:
            raise UserError(f"rates is {self.rates}: give positive learning rates")
        for name in self.only or []:
            if name not in ARMS:
                raise UserError(f"only {name!r} is unknown: it must be one of {'; '.join(ARMS)}")
        refuse_missing_folders(self, "runs_file", "output_json")

    @property
    def arms(self) -> list[str]:
        """Names of the arms to train."""
        return [arm for arm in ARMS if self.only is None or arm in self.only]


@dataclass(frozen=True)
class Job:
    """Describes one run, which trains on the first `facts` facts of its seed.

    Seed 0 is the search for a learning rate; compared runs have seeds from 1 on.
    """

    arm: str
    seed: int
    learning_rate: float
    steps: int
    facts: int


@dataclass(frozen=True)
class Run:
    """Holds the results of a [`Job`].

    Attributes:
        arm, seed, learning_rate, steps, facts: the fields of the job.
        initial_prose_loss: loss on held-out prose before training, in nats per token.
        prose_loss: loss on held-out prose after training, in nats per token.
        recall_bits: log2(10) minus the bits that a digit of a trained fact costs: 3.32 if all digits are known, 0 for
            guessing.
        exact_match: share of the facts whose digits are all correct in greedy decoding.
        seconds: time of building, training and evaluation.
    """

    arm: str
    seed: int
    learning_rate: float
    steps: int
    facts: int
    initial_prose_loss: float
    prose_loss: float
    recall_bits: float
    exact_match: float
    seconds: float

    @property
    def job(self) -> Job:
        """The job of the run."""
        return Job(self.arm, self.seed, self.learning_rate, self.steps, self.facts)


@dataclass(frozen=True)
class FactsResult:
    """Holds the results of the experiment.

    Attributes:
        tokens: number of tokens of a run with the dense model's compute.
        active_widths: number of neurons that a token uses in a layer, by arm.
        steps: number of steps of a compared run, by arm.
        rates: learning rate that the short runs chose, by arm.
        sweeps: the short runs.
        runs: the compared runs.
        comparisons: comparisons of `PAIRS` in each metric.
    """

    tokens: int
    active_widths: dict[str, int]
    steps: dict[str, int]
    rates: dict[str, float]
    sweeps: list[Run]
    runs: list[Run]
    comparisons: list[Comparison]


def prepare(args: FactsArguments) -> FactsData:
    """Makes the data and the trained layers of all runs; the labels of a fact's name are -100.

    Raises:
        UserError: if the model or a number cannot be used.
    """
    trust = {"trust_remote_code": args.trust_remote_code}
    checkpoint = open_checkpoint(args.model_name_or_path, args.gguf_file, "float32", **trust)
    config = checkpoint.config
    if "sparse" in config.mlp_layer_types or not args.layers < config.num_hidden_layers:
        raise UserError(
            f"layers is {args.layers}: it must be less than the {config.num_hidden_layers} layers of a dense model"
        )
    for arm in args.arms:
        # an arm that cannot be made for this width is refused before anything is computed
        arm_model(arm, config, checkpoint.state, args.seed)
    tokenizer = load_tokenizer(str(checkpoint.source.folder), checkpoint.source.gguf_file, **trust)
    facts = make_facts(tokenizer, args.facts, 1 + args.seeds, args.seed)  # (1 + seeds, N, M)
    length = args.facts_per_row * facts.shape[-1]
    pool, held_out = prose_rows(tokenizer, length, (args.prose_pool, args.held_out_rows), args.seed)
    kept = torch.cat([facts[..., -DIGITS:].flatten(), pool.flatten(), held_out.flatten()]).unique()
    first = config.num_hidden_layers - args.layers
    digits = torch.searchsorted(kept, facts[..., -DIGITS:].contiguous())
    names = digits.new_full((*facts.shape[:2], facts.shape[-1] - DIGITS), -100)
    fact_states = entering_states(config, checkpoint.state, first, facts.flatten(0, 1))
    pool_states = entering_states(config, checkpoint.state, first, pool)
    held_out_states = entering_states(config, checkpoint.state, first, held_out)
    tail_config, tail_state = tail_model(config, checkpoint.state, first, kept)
    return FactsData(
        config=tail_config.to_dict(),
        weights={name: tensor.read() for name, tensor in tail_state.items()},
        facts=Rows(fact_states.unflatten(0, facts.shape[:2]), torch.cat([names, digits], dim=-1)),
        prose=Rows(pool_states, torch.searchsorted(kept, pool)),
        held_out=Rows(held_out_states, torch.searchsorted(kept, held_out)),
    )


def arm_model(arm: str, config: MoEConfig, state: State, seed: int) -> tuple[MoEConfig, State]:
    """Returns the configuration and the checkpoint that an arm starts with."""
    fields = ARMS[arm]
    if fields is None:
        return config, state
    options = UpcyclingOptions(**fields, seed=seed)
    made_config = sparse_config(config, options, torch.float32)
    made = assemble([state], made_config, options, {})
    return made_config, with_own_rows(made, made_config, options) if arm in OWN_ROWS else made


def active_width(arm: str, width: int) -> int:
    """Returns how many neurons of a layer a token uses; a dense network has `width`, and routers are not counted."""
    fields = ARMS[arm]
    if fields is None:
        return width
    options = UpcyclingOptions(**fields)
    return options.num_experts_per_tok * width // options.granularity + options.shared_expert * width


def steps_of(arm: str, steps: int, width: int) -> int:
    """Returns how many steps of an arm cost as much as `steps` dense steps, in the feed-forward networks."""
    return max(1, round(steps * width / active_width(arm, width)))


def batches(data: FactsData, args: FactsArguments, job: Job) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the model's arguments for each step: rows of facts, then rows of prose.

    All arms of one seed read equal batches.
    """
    count = args.fact_rows * args.facts_per_row
    facts = shuffled(job.facts, count, generator_for(args.seed, "facts", job.seed))
    prose = shuffled(args.prose_pool, args.prose_rows, generator_for(args.seed, "prose", job.seed))
    length = data.prose.states.shape[1]
    at = torch.cat(
        [positions(args.fact_rows, length, args.facts_per_row), torch.arange(length).expand(args.prose_rows, -1)]
    )
    for _, chosen, rows in zip(range(job.steps), facts, prose, strict=False):
        fact_states = data.facts.states[job.seed, chosen].reshape(args.fact_rows, length, -1)
        fact_labels = data.facts.labels[job.seed, chosen].reshape(args.fact_rows, length)
        yield {
            "inputs_embeds": torch.cat([fact_states, data.prose.states[rows]]),
            "labels": torch.cat([fact_labels, data.prose.labels[rows]]),
            "position_ids": at,
        }


@torch.no_grad()
def prose_loss(model: MoEForCausalLM, held_out: Rows) -> float:
    """Returns the loss on held-out prose in nats per token."""
    model.eval()
    total, count = 0.0, 0
    for states, labels in zip(held_out.states.split(8), held_out.labels.split(8), strict=True):
        logits = model(inputs_embeds=states, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
        count += labels[:, 1:].numel()
    return total / count


@torch.no_grad()
def recall(model: nn.Module, facts: Rows) -> tuple[float, float]:
    """Measures how much a model knows of facts (N, M).

    Returns:
        The bits recalled per digit, and the share of facts in which every digit is the most likely token.
    """
    model.eval()
    bits, exact = [], []
    for states, labels in zip(facts.states.split(64), facts.labels.split(64), strict=True):
        logits = model(inputs_embeds=states, use_cache=False).logits[:, -DIGITS - 1 : -1]  # (N, DIGITS, V)
        digits = labels[:, -DIGITS:]
        bits.append(nn.functional.cross_entropy(logits.transpose(1, 2), digits, reduction="none") / math.log(2))
        exact.append((logits.argmax(dim=-1) == digits).all(dim=1))
    return math.log2(10) - torch.cat(bits).mean().item(), torch.cat(exact).float().mean().item()


def trainable(model: MoEForCausalLM) -> list[nn.Parameter]:
    """Freezes everything except feed-forward networks and routers, and returns their parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(job: Job, data: FactsData, args: FactsArguments) -> Run:
    """Trains an arm on cached states and measures the result."""
    began = time.perf_counter()
    torch.manual_seed(job.seed)
    # training changes the copy, not the shared weights
    state = {name: LazyTensor.of(tensor).map(torch.clone) for name, tensor in data.weights.items()}
    model = load_state(*arm_model(job.arm, MoEConfig(**data.config), state, job.seed))
    parameters = trainable(model)
    initial = prose_loss(model, data.held_out)
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * job.steps), job.steps)
    model.train()
    for batch in batches(data, args, job):
        model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    learned = Rows(data.facts.states[job.seed, : job.facts], data.facts.labels[job.seed, : job.facts])
    bits, exact = recall(model, learned)
    final = prose_loss(model, data.held_out)
    return Run(
        **asdict(job),
        initial_prose_loss=initial,
        prose_loss=final,
        recall_bits=bits,
        exact_match=exact,
        seconds=time.perf_counter() - began,
    )


def train_from_file(job: Job, path: str, args: FactsArguments) -> Run:
    """Calls [`train`] on one thread with the data in a file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(job, FactsData.load(path), args)
    finally:
        torch.set_num_threads(threads)


def settings_of(args: FactsArguments) -> dict[str, Any]:
    """Returns the arguments that all runs depend on."""
    return {
        name: value for name, value in asdict(args).items() if name not in (*FREE_ARGUMENTS, "steps", "sweep_steps")
    }


def finished_runs(args: FactsArguments) -> dict[Job, Run]:
    """Reads the runs in `runs_file`.

    Raises:
        UserError: if the runs have other arguments, or the file does not hold runs.
    """
    file = RunsFile(args.runs_file, settings_of(args))
    return {run.job: run for run in file.read(lambda run: Run(**run))}


def run_jobs(
    jobs: Sequence[Job], path: str, args: FactsArguments, done: dict[Job, Run], file: RunsFile, desc: str
) -> list[Run]:
    """Runs the jobs that are not in `done` and returns all runs in the order of `jobs`.

    New runs are added to `done` and `file`.
    """

    def finish(run: Run) -> None:
        done[run.job] = run
        file.add(asdict(run))

    missing = [(job, path, args) for job in jobs if job not in done]
    run_all(missing, train_from_file, args.workers, finish, file, desc)
    return [done[job] for job in jobs]


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Compares the pairs of `PAIRS` whose arms were run, seed by seed."""
    by_arm: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_arm.setdefault(run.arm, []).append(run)
    return [
        Comparison(
            metric,
            first,
            second,
            *interval(
                [getattr(a, metric) - getattr(b, metric) for a, b in zip(by_arm[first], by_arm[second], strict=True)]
            ),
        )
        for metric in METRICS
        for first, second in PAIRS
        if first in by_arm and second in by_arm
    ]


def best_rates(sweeps: Sequence[Run]) -> dict[str, float]:
    """Returns the learning rate with the highest recall of each arm; a run that diverged comes last."""

    def worth(run: Run) -> float:
        return run.recall_bits if math.isfinite(run.recall_bits) else -math.inf

    best: dict[str, Run] = {}
    for run in sweeps:
        if run.arm not in best or worth(run) > worth(best[run.arm]):
            best[run.arm] = run
    return {arm: run.learning_rate for arm, run in best.items()}


def facts_experiment(args: FactsArguments) -> FactsResult:
    """Finds the learning rate of each arm by short runs, then trains each arm with `seeds` seeds.

    Raises:
        UserError: if an argument, the model or `runs_file` cannot be used; nothing is trained then.
    """
    file, done = RunsFile(args.runs_file, settings_of(args)), finished_runs(args)
    data = prepare(args)
    width: int = data.config["intermediate_size"]
    row = data.prose.states.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "data.pt")
        data.save(path)
        del data
        # the facts are reduced like the steps, so that each fact is seen as often as in the long runs
        least = args.fact_rows * args.facts_per_row
        few = min(args.facts, max(least, round(args.facts * args.sweep_steps / args.steps)))
        short = [
            Job(arm, 0, rate, steps_of(arm, args.sweep_steps, width), few) for arm in args.arms for rate in args.rates
        ]
        sweeps = run_jobs(short, path, args, done, file, "search for rates")
        rates = best_rates(sweeps)
        steps = {arm: steps_of(arm, args.steps, width) for arm in args.arms}
        seeds = range(1, args.seeds + 1)
        jobs = [Job(arm, seed, rates[arm], steps[arm], args.facts) for seed in seeds for arm in args.arms]
        runs = run_jobs(jobs, path, args, done, file, "runs")
    return FactsResult(
        tokens=args.steps * (args.fact_rows + args.prose_rows) * row,
        active_widths={arm: active_width(arm, width) for arm in args.arms},
        steps=steps,
        rates=rates,
        sweeps=sweeps,
        runs=runs,
        comparisons=compare(runs),
    )
