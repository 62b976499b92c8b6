# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Measure whether a dense model learns more after upcycling, at equal tokens or FLOPs; a part of the GPU check.

SmolLM2-135M continues training, dense and as two mixtures of experts, on the source code of the machine's Python
packages. All arms have equal batches in equal order, and AdamW at one rate, which is constant after the warm-up, so
that every point of a run equals the end of a shorter run. The dense model trains until it has used the FLOPs of the
most expensive mixture, and is also scored where it has used those of each mixture: that is the comparison at equal
FLOPs. Seeds change routers and order; they run one after another, so that complete comparisons exist when the time is
over.

The model computes in bf16, and AdamW updates fp32 copies, as in pre-training: updates smaller than bf16's precision
are not lost, and, unlike with autocast, no arm casts all its experts in every pass. `python -m
moe_benchmark.gpu.weights --help` says how the weights reach the machine.

    python -m moe_benchmark.gpu.science --weights outputs/weights --results outputs/gpu/results.jsonl
"""

import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from experiments.flops import flops_per_token
from experiments.upcycling_initial_loss import TOLERANCE, compare_logits
from torch import nn

from modeling_moe.checkpoints import LazyTensor, State
from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.dispatch import backend_of
from modeling_moe.evaluation import score
from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.upcycling import UpcyclingOptions, assemble, reason_not_exact, sparse_config
from modeling_moe.utils.command_line import parse
from modeling_moe.utils.command_line import run as run_main
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_tokenizer, parse_dtype
from modeling_moe.utils.seeds import generator_for

from .results import Results
from .science_text import TOKEN_CHARACTERS, Blocks, Text, installed_sources, make_blocks, read_text, sources_in
from .sizes import FULL, TINY, Size
from .weights import FOLDER, KEPT, model_path


DENSE = "dense"
# arm -> options of upcycling; None trains the dense model
ARMS: dict[str, dict[str, Any] | None] = {
    DENSE: None,
    "64 experts, K=8": {"num_experts": 64, "granularity": 8, "num_experts_per_tok": 8},
    "8 experts, K=2": {"num_experts": 8, "num_experts_per_tok": 2},
}
LEAST_STEPS = 20
PROBE_STEPS = (3, 5)  # number of steps to warm up, and to time
MARGIN = 0.92


@dataclass
class Arguments:
    """These arguments name the model and the text, and limit the time."""

    weights: str = field(default=FOLDER, metadata={"help": "folder of the model, of a GGUF file, or of parts of it"})
    kept: str = field(default=KEPT, metadata={"help": "folder in which the parts are joined"})
    results: str = field(
        default="outputs/gpu/results.jsonl", metadata={"help": "file to which result lines are appended"}
    )
    text_dir: str | None = field(
        default=None, metadata={"help": "folder of .py and .txt files; without it, the installed Python packages"}
    )
    seconds: float = field(
        default=280.0, metadata={"help": "seconds for everything, from loading to the last evaluation"}
    )
    seeds: int = field(default=3, metadata={"help": "number of runs of each arm; fewer if the seconds do not suffice"})
    steps: int | None = field(
        default=None, metadata={"help": "number of optimizer steps; without it, as many as the seconds allow"}
    )
    rows: int = field(default=32, metadata={"help": "number of sequences in a step"})
    length: int = field(default=512, metadata={"help": "number of tokens in a sequence"})
    held_out: int = field(default=128, metadata={"help": "number of sequences of held-out text"})
    characters: int = field(default=24_000_000, metadata={"help": "characters of the text to train on"})
    rate: float = field(default=3e-4, metadata={"help": "learning rate of AdamW, for all arms"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps in which the learning rate rises"})
    evaluations: int = field(
        default=4, metadata={"help": "number of evaluations of a run, at equal distances, beside the one at step 0"}
    )
    device: str = field(default="auto", metadata={"help": "cuda, cpu, or auto: cuda if there is a GPU, else cpu"})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the model: bfloat16 or float32"})

    def __post_init__(self):
        for name in ("seeds", "rows", "held_out", "evaluations", "characters", "seconds", "rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be positive")
        if self.length < 2 or (self.steps is not None and self.steps < 1):
            raise UserError(f"length is {self.length} and steps is {self.steps}: give at least 2 and 1")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype is {self.dtype!r}: choose bfloat16 or float32")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def tiny_arguments() -> Arguments:
    """Returns the arguments of a run on the smallest text that has all steps."""
    return Arguments(steps=2, seeds=1, evaluations=1, rows=2, length=16, held_out=2, characters=20_000)


@dataclass(frozen=True)
class Setting:
    """Holds what all runs share.

    Attributes:
        args: the arguments.
        config: configuration of the dense model.
        state: fp32 checkpoint of the dense model, on the device.
        training: blocks (N, S) int64 on the device.
        blocks: blocks of the text.
    """

    args: Arguments
    config: MoEConfig
    state: State
    training: torch.Tensor
    blocks: Blocks

    def arm_config(self, arm: str) -> MoEConfig:
        """Returns the configuration of an arm's model."""
        fields = ARMS[arm]
        return self.config if fields is None else sparse_config(self.config, UpcyclingOptions(**fields), torch.float32)


@dataclass(frozen=True)
class Probe:
    """Holds the seconds that an arm takes to be built, for a step, and for an evaluation."""

    build_s: float
    step_s: float
    evaluation_s: float


@dataclass(frozen=True)
class Plan:
    """Says how long all arms train.

    Attributes:
        steps: number of steps of every arm.
        seeds: number of seeds.
        dense_steps: number of steps of the dense model that cost as much as `steps` steps of an arm, by arm.
        flops: FLOPs of a token, forward and backward, by arm.
    """

    steps: int
    seeds: int
    dense_steps: dict[str, int]
    flops: dict[str, float]

    def stops(self, arm: str, evaluations: int) -> list[int]:
        """Returns the steps after which an arm is scored, in ascending order; the last one ends the run."""
        stops = {round(self.steps * number / evaluations) for number in range(evaluations + 1)}
        return sorted(stops | set(self.dense_steps.values()) if arm == DENSE else stops)


@contextmanager
def all_cores() -> Iterator[None]:
    """Lets tokenizers use all cores whatever the environment says, which is safe because no process is forked here."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def read_setting(args: Arguments, results: Results) -> Setting:
    """Reads the model and the text.

    Raises:
        UserError: if one of them does not exist.
    """
    folder, gguf = model_path(Path(args.weights), Path(args.kept))
    checkpoint = open_checkpoint(str(folder), gguf, "float32")
    state = {name: LazyTensor.of(tensor.read().to(args.device)) for name, tensor in checkpoint.state.items()}
    tokenizer = load_tokenizer(str(folder), gguf)
    paths = installed_sources() if args.text_dir is None else sources_in(Path(args.text_dir))
    text = read_text(paths, args.characters, 2 * TOKEN_CHARACTERS * args.held_out * args.length)
    blocks = make_blocks(text, tokenizer, args.length, args.held_out)
    results.put(what="text", model=gguf or folder.name, **text_facts(text, blocks))
    return Setting(args, checkpoint.config, state, blocks.training.to(args.device), blocks)


def text_facts(text: Text, blocks: Blocks) -> dict[str, int]:
    """Returns the sizes of the text."""
    return {
        "training_files": len(text.training),
        "held_out_files": len(text.held_out),
        "unread": text.unread,
        "copies": text.copies,
        "removed_paragraphs": text.removed,
        "training_tokens": blocks.training.numel(),
        "held_out_tokens": sum(map(len, blocks.held_out["input_ids"])),
    }


def build(setting: Setting, arm: str, seed: int) -> MoEForCausalLM:
    """Builds an arm's initial model in fp32 on the device."""
    fields, state, config = ARMS[arm], setting.state, setting.arm_config(arm)
    if fields is not None:
        state = assemble([state], config, UpcyclingOptions(**fields, seed=seed), {})
    # pyrefly: ignore[bad-argument-type]: transformers' decorator of `to` hides that it is a method
    model = load_state(config, state).to(setting.args.device)
    for parameter in model.parameters():
        # training must not change the checkpoint, because the next arm starts from it
        parameter.data = parameter.data.clone()
    return model


class Training:
    """Trains a model that computes in `args.dtype`, by AdamW on fp32 copies of the weights.

    Args:
        model: model in fp32, which is cast here.
        args: learning rate and dtype.
        steps: number of steps, of which the warm-up is a share.
    """

    def __init__(self, model: MoEForCausalLM, args: Arguments, steps: int):
        self.model, self.args, self.steps, self.done = model, args, steps, 0
        self.parameters = list(model.parameters())
        self.masters = [nn.Parameter(parameter.detach()) for parameter in self.parameters]
        dtype, kept = parse_dtype(args.dtype), model.model._keep_in_fp32_modules_strict or set()
        for name, parameter in model.named_parameters():
            # routers remain in fp32, as in a checkpoint that is loaded in bf16
            if not any(name.endswith(suffix) for suffix in kept):
                parameter.data = parameter.data.to(dtype)
        self.optimizer = torch.optim.AdamW(self.masters, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Trains on sequences (B, S), and returns the loss with router losses, without waiting for the device."""
        self.model.train()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * min(1.0, self.done / max(1, round(self.args.warmup * self.steps)))
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)
        self.model.update_routers()
        return loss.detach()


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields indices (size,) without end; all `count` indices come in random order before any comes again."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def order(setting: Setting, seed: int) -> Iterator[torch.Tensor]:
    """Yields rows (B,) of `training` without end: all rows in random order, then all in another order."""
    return shuffled(len(setting.training), setting.args.rows, generator_for(seed, "order"))


def wait(device: str) -> float:
    """Waits until the device has finished, and returns the time in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def probe(setting: Setting, arm: str, results: Results) -> Probe:
    """Times an arm after its kernels have been compiled."""
    args, began = setting.args, wait(setting.args.device)
    training = Training(build(setting, arm, seed=0), args, 1)
    built, rows = wait(args.device), order(setting, 0)
    for _ in range(PROBE_STEPS[0]):
        training.step(setting.training[next(rows)])
    score(training.model, setting.blocks.held_out, args.rows, desc=arm)
    warm = wait(args.device)
    for _ in range(PROBE_STEPS[1]):
        training.step(setting.training[next(rows)])
    trained = wait(args.device)
    score(training.model, setting.blocks.held_out, args.rows, desc=arm)
    found = Probe(built - began, (trained - warm) / PROBE_STEPS[1], wait(args.device) - trained)
    results.put(what="probe", arm=arm, first_s=warm - built, backend=served_by(training.model), **asdict(found))
    return found


def served_by(model: MoEForCausalLM) -> str:
    """Returns the back end that computes the experts, see [`~modeling_moe.dispatch.backend_of`]; `"dense"` without
    experts.
    """
    blocks = model.model.sparse_blocks()
    if not blocks:
        return DENSE
    experts, config = blocks[0].experts, model.config
    tokens = torch.zeros(1024, config.hidden_size, dtype=experts.down_proj.dtype, device=model.device)
    index = torch.zeros(1024, config.num_experts_per_tok, dtype=torch.long, device=model.device)
    return backend_of(experts, tokens, index)


def make_plan(args: Arguments, flops: dict[str, float], probes: dict[str, Probe], seconds: float) -> Plan:
    """Returns the number of steps that `seconds` allow; with all seeds if each gets at least 20 steps, else with
    fewer.

    Args:
        args: seeds and evaluations; `steps` replaces the time.
        flops: FLOPs of a token of each arm, `"dense"` among them.
        probes: probe of each arm; empty if `args.steps` is given.
        seconds: seconds left.

    Raises:
        UserError: if the time does not allow 20 steps of one seed.
    """

    def planned(steps: int, seeds: int) -> Plan:
        ratios = {arm: value / flops[DENSE] for arm, value in flops.items()}
        return Plan(steps, seeds, {arm: round(steps * ratio) for arm, ratio in ratios.items()}, flops)

    if args.steps is not None:
        return planned(args.steps, args.seeds)
    more = {
        arm: max(1.0, *(value / flops[DENSE] for value in flops.values())) if arm == DENSE else 1.0 for arm in flops
    }
    scores = {arm: args.evaluations + 1 + (arm == DENSE) * (len(flops) - 1) for arm in flops}
    fixed = sum(probes[arm].build_s + scores[arm] * probes[arm].evaluation_s for arm in flops)
    each = sum(probes[arm].step_s * more[arm] for arm in flops)
    for seeds in range(args.seeds, 0, -1):
        steps = math.floor((MARGIN * seconds / seeds - fixed) / each)
        if steps >= LEAST_STEPS:
            return planned(steps, seeds)
    least = (LEAST_STEPS * each + fixed) / MARGIN
    raise UserError(f"seconds is {args.seconds:g}, of which {seconds:.0f} are left: one seed needs {least:.0f}")


def check_exact(setting: Setting, arm: str, results: Results) -> None:
    """Writes the distance of an arm's initial fp32 logits from the dense model's; it is an error if they should be
    equal.
    """
    options = UpcyclingOptions(**ARMS[arm] or {})
    rows = setting.blocks.held_out[:2]["input_ids"]
    ids = torch.tensor([list(row) for row in rows], device=setting.args.device)
    with torch.no_grad():
        expected = build(setting, DENSE, seed=1)(input_ids=ids, use_cache=False).logits
    model = build(setting, arm, seed=1)
    delta, difference = compare_logits(model, ids, expected)
    line = {"what": "exact", "arm": arm, "delta_loss": delta, "largest_difference": difference}
    if reason_not_exact(options, model.config):
        results.put(**line)
    else:
        results.check(f"{arm} computes the dense function at step 0", difference <= TOLERANCE, **line)


def train_arm(setting: Setting, plan: Plan, arm: str, seed: int, results: Results) -> None:
    """Trains an arm to the end, and writes a line after every evaluation."""
    args, device, tokens = setting.args, setting.args.device, setting.args.rows * setting.args.length
    model = build(setting, arm, seed)
    training, rows, seen, seconds, losses = Training(model, args, plan.steps), order(setting, seed), 0, 0.0, []
    for stop in plan.stops(arm, args.evaluations):
        began = wait(device)
        losses = []
        while training.done < stop:
            chosen = next(rows)
            seen = zlib.crc32(chosen.numpy().tobytes(), seen)
            losses.append(training.step(setting.training[chosen]))
        seconds += wait(device) - began
        found = score(model, setting.blocks.held_out, args.rows, desc=f"{arm}, seed {seed}")
        results.put(
            what="evaluation",
            arm=arm,
            seed=seed,
            step=stop,
            tokens=stop * tokens,
            flops=stop * tokens * plan.flops[arm],
            loss=found.loss,
            bits_per_byte=found.bits_per_byte,
            max_vio=found.max_vio,
            dead_experts=found.dead_experts,
            train_loss=torch.stack(losses).mean().item() if losses else None,
            training_s=seconds,
            batches=f"{seen:08x}",
        )


def train_seeds(setting: Setting, plan: Plan, left: Callable[[], float], results: Results) -> None:
    """Trains all arms seed by seed; a seed is not started if the time of the last one exceeds the time left.

    Args:
        setting: what all runs share.
        plan: number of steps and seeds.
        left: function that returns the seconds left.
        results: file of results.
    """
    took = 0.0
    for seed in range(1, plan.seeds + 1):
        if took > left():
            results.put(
                what="seed", seed=seed, not_run=f"{left():.0f} s are left, and the last seed took {took:.0f} s"
            )
            return
        began, failed = time.perf_counter(), []
        for arm in plan.flops:
            failed.append(arm)
            with results.attempt(what="arm", arm=arm, seed=seed):
                train_arm(setting, plan, arm, seed, results)
                failed.pop()
        took = time.perf_counter() - began
        results.put(what="seed", seed=seed, finished=True, failed=failed, took_s=took)


def run(results: Results, size: Size = FULL, args: Arguments | None = None) -> None:
    """Writes the text's sizes, a probe of each arm, the plan, and an evaluation after each part of each run.

    If an arm fails, the failure is recorded and other arms run; without the dense arm nothing is trained.

    Args:
        results: file of results; nothing new starts after `results.until`.
        size: size of the check.
        args: arguments that replace those of that size.

    Raises:
        UserError: if the model or the text does not exist, or the time does not suffice.
    """
    args, began = args or (tiny_arguments() if size is TINY else Arguments()), time.perf_counter()

    def left() -> float:
        return min(args.seconds - (time.perf_counter() - began), results.seconds_left())

    results.put(what="setting", **asdict(args), options=ARMS)
    with all_cores():
        setting = read_setting(args, results)
    for arm in ARMS:
        if arm != DENSE:
            with results.attempt(what="exact", arm=arm):
                check_exact(setting, arm, results)
    probes: dict[str, Probe] = {}
    timed = args.steps is None
    for arm in ARMS if timed else ():
        with results.attempt(what="probe", arm=arm):
            probes[arm] = probe(setting, arm, results)
    flops = {arm: flops_per_token(setting.arm_config(arm), args.length) for arm in (probes if timed else ARMS)}
    if DENSE not in flops:
        raise UserError("the dense model could not be trained, so that nothing was compared: see the error above")
    plan = make_plan(args, flops, probes, left())
    results.put(
        what="plan",
        **asdict(plan),
        parameters={arm: setting.arm_config(arm).num_params() for arm in flops},
        tokens_per_step=args.rows * args.length,
        epochs=max(plan.stops(DENSE, args.evaluations)) * args.rows / len(setting.training),
        stops={arm: plan.stops(arm, args.evaluations) for arm in flops},
    )
    train_seeds(setting, plan, left, results)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the part alone."""
    (args,) = parse([Arguments], __doc__, argv)
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    run(Results(args.results, "science"), args=args)


if __name__ == "__main__":
    run_main(main)
