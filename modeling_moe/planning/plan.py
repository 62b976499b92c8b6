# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module plans a model: parameters, memory and time of generation and of training, on one device or several."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from ..utils.errors import UserError
from .advice import Change, Choice, inference_changes, training_changes
from .communication import Collective, collectives
from .devices import Device
from .fitting import largest
from .memory import Memory, gradient_bytes, inference_memory, training_memory
from .parallelism import Parallelism
from .recording import RunCost
from .simulation import (
    METHODS,
    RECOMPUTE,
    Method,
    Prefill,
    Recompute,
    SimulatedModel,
    SimulationError,
    cache_bytes,
    simulated_model,
)
from .sizes import Sizes, sizes_of
from .timing import PassTime, bound_by, exchange_seconds, optimizer_seconds, run_seconds


# sequences in a batch, and tokens in a sequence, beyond which a plan does not look
MOST_SEQUENCES, MOST_TOKENS = 65_536, 1_048_576


@dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        device: where the model runs.
        dtype: dtype of the weights to generate, and to train by LoRA.
        train_dtype: dtype of the weights that train whole.
        batch_size: sequences of one process.
        sequence_length: tokens of a sequence.
        train: what trains.
        recompute: what backward computes again.
        lora_r: rank of LoRA's updates.
        parallelism: over how many processes the model is split.
        experts_implementation: name of an experts function of transformers' interface.
        trust_remote_code: whether Python code that the checkpoint brings may run.
        limits: whether to search the largest batch and sequence, which takes a few more simulations.
    """

    device: Device
    dtype: torch.dtype
    train_dtype: torch.dtype
    batch_size: int = 1
    sequence_length: int = 2048
    train: Sequence[Method] = METHODS
    recompute: Sequence[Recompute] = RECOMPUTE
    lora_r: int = 16
    parallelism: Parallelism = field(default_factory=Parallelism)
    experts_implementation: str = "moe"
    trust_remote_code: bool = False
    limits: bool = True

    def __post_init__(self):
        for name in ("batch_size", "sequence_length", "lora_r"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.batch_size > MOST_SEQUENCES or self.sequence_length > MOST_TOKENS:
            raise UserError(
                f"batch_size and sequence_length are {self.batch_size} and {self.sequence_length}: they must be at most "
                f"{MOST_SEQUENCES} and {MOST_TOKENS}"
            )


@dataclass(frozen=True)
class TrainingPlan:
    """Memory and time of one optimizer step with one micro-batch.

    Attributes:
        method: what trains.
        recompute: what backward computes again.
        dtype: dtype of the weights.
        trained: number of parameters that train.
        memory: memory of one process.
        time: time of the step.
        bound_by: what takes most of the computation's time.
        exchange: what the processes exchange.
        fits: whether the memory is enough.
    """

    method: Method
    recompute: Recompute
    dtype: torch.dtype
    trained: int
    memory: Memory
    time: PassTime
    bound_by: str
    exchange: list[Collective]
    fits: bool


@dataclass(frozen=True)
class InferencePlan:
    """Memory and time of a generation.

    Attributes:
        dtype: dtype of the weights.
        memory: memory of one process, the cache included.
        cache: bytes of the cache after the prompt.
        cache_per_token: bytes by which one further token of one sequence lets the cache grow.
        prefill: time of the prompt's pass.
        decode: time of the pass of one further token of each sequence.
        prefill_bound_by: what takes most of the prompt's time.
        decode_bound_by: what takes most of the time to decode.
        exchange: what the processes exchange in the prompt's pass.
        fits: whether the memory is enough.
    """

    dtype: torch.dtype
    memory: Memory
    cache: int
    cache_per_token: int
    prefill: PassTime
    decode: PassTime
    prefill_bound_by: str
    decode_bound_by: str
    exchange: list[Collective]
    fits: bool


@dataclass(frozen=True)
class Limits:
    """The largest sizes that fit.

    Attributes:
        what: which plan they hold for.
        batch_size: largest number of sequences of the length asked for; 0 if not even one fits.
        sequence_length: largest length of one sequence, 0 if nothing fits.
    """

    what: str
    batch_size: int
    sequence_length: int


@dataclass(frozen=True)
class ModelPlan:
    """A plan of a model.

    Attributes:
        request: what was planned.
        sizes: parameters of the model.
        inference: the plan of a generation; None if it cannot be simulated.
        training: the plans of training, one for each method and each kind of recomputation.
        limits: largest batches and sequences: for generation, and for the first of the training plans.
        changes: what to change where the generation, or the first of the training plans, does not fit.
        notes: sentences on what could not be planned, and why, and on a sequence longer than the model's positions.
    """

    request: Request
    sizes: Sizes
    inference: InferencePlan | None
    training: list[TrainingPlan]
    limits: list[Limits]
    changes: dict[str, list[Change]]
    notes: list[str]


class Planner:
    """Simulates a model for the plans, each run once.

    Args:
        config: configuration of a causal LM.
        request: what to plan.
    """

    def __init__(self, config: PreTrainedConfig, request: Request):
        self.config, self.request = config, request
        self._models: dict[tuple[str | None, torch.dtype], SimulatedModel] = {}
        self._steps: dict[tuple[str, torch.dtype, str, int, int], RunCost] = {}

    def model(self, method: Method | None, dtype: torch.dtype) -> SimulatedModel:
        """Returns the simulated model for a method; that of qlora runs as that of lora."""
        if (method, dtype) not in self._models:
            request = self.request
            rank, function, trust = request.lora_r, request.experts_implementation, request.trust_remote_code
            if method == "qlora":
                self._models[method, dtype] = replace(self.model("lora", dtype), method="qlora")
            else:
                self._models[method, dtype] = simulated_model(self.config, dtype, method, rank, function, trust)
        return self._models[method, dtype]

    def step(self, method: Method, dtype: torch.dtype, recompute: Recompute, batch_size: int, length: int) -> RunCost:
        """Returns the cost of forward and backward."""
        key = ("lora" if method == "qlora" else method, dtype, recompute, batch_size, length)
        if key not in self._steps:
            self._steps[key] = self.model(method, dtype).training_step(batch_size, length, recompute)
        return self._steps[key]

    def training_memory(self, choice: Choice, batch_size: int, length: int) -> Memory:
        """Returns the memory of one process for a choice."""
        cost = self.step(choice.method, choice.dtype, choice.recompute, batch_size, length)
        sizes = sizes_of(self.model(choice.method, choice.dtype))
        parallelism = replace(self.request.parallelism, fsdp_size=choice.fsdp_size)
        return training_memory(sizes, cost, parallelism, choice.method == "qlora")

    def prefill(self, batch_size: int, length: int) -> Prefill:
        """Returns the cost of the prompt's pass, and the cache."""
        return self.model(None, self.request.dtype).prefill(batch_size, length)

    def inference_memory(self, batch_size: int, length: int) -> Memory:
        """Returns the memory of one process that generates."""
        sizes = sizes_of(self.model(None, self.request.dtype))
        return inference_memory(sizes, self.prefill(batch_size, length).cost, self.request.parallelism)


def make_plan(config: PreTrainedConfig, request: Request) -> ModelPlan:
    """Plans a model from its configuration.

    Args:
        config: configuration of a causal LM.
        request: what to plan.

    Raises:
        UserError: if the configuration makes no causal LM, or the sizes of the groups of processes do not fit it.
    """
    planner = Planner(config, request)
    sizes = sizes_of(planner.model(None, request.dtype))
    request.parallelism.check(sizes.num_experts)
    _refuse_few_experts(sizes)
    unplanned: dict[str, list[str]] = {}
    inference, training = None, []
    try:
        inference = _inference_plan(planner, sizes)
    except SimulationError as error:
        unplanned.setdefault(str(error), []).append("generation")
    for method in request.train:
        try:
            training += [_training_plan(planner, method, recompute) for recompute in request.recompute]
        except UserError as error:  # noqa: PERF203
            unplanned.setdefault(str(error), []).append(f"train {method}")
    notes = [f"not planned: {', '.join(names)}: {reason}" for reason, names in unplanned.items()]
    if request.sequence_length > (longest := _longest(config)):
        notes.insert(0, f"sequence_length is {request.sequence_length:,}, and the model has {longest:,} positions")
    return ModelPlan(
        request=request,
        sizes=sizes,
        inference=inference,
        training=training,
        limits=_limits(planner, inference, training[:1]) if request.limits else [],
        changes=_changes(planner, sizes, inference, training[:1]),
        notes=notes,
    )


def _refuse_few_experts(sizes: Sizes) -> None:
    """Refuses a configuration that sends a token to more experts than there are, as the model fails in each pass."""
    if sizes.num_experts and (sizes.top_k or 0) > sizes.num_experts:
        raise UserError(
            f"config.json sends each token to {sizes.top_k} experts, and the model has {sizes.num_experts}: correct one of "
            "the numbers"
        )


def train_dtype(method: Method, request: Request) -> torch.dtype:
    """Returns the dtype of the weights that a method trains."""
    return request.dtype if method in ("lora", "qlora") else request.train_dtype


def _training_plan(planner: Planner, method: Method, recompute: Recompute) -> TrainingPlan:
    request, dtype = planner.request, train_dtype(method, planner.request)
    cost = planner.step(method, dtype, recompute, request.batch_size, request.sequence_length)
    sizes = sizes_of(planner.model(method, dtype))
    if method == "qlora" and not sizes.experts_in_4_bits:
        raise UserError("a model without matrices of experts has none to hold in 4 bits: choose lora")
    if method == "qlora" and not request.parallelism.keeps_experts:
        raise UserError("tp_size and ep_size split experts, and experts in 4 bits cannot be split so: choose lora")
    parallelism, device = request.parallelism, request.device
    tokens = request.batch_size * request.sequence_length
    memory = training_memory(sizes, cost, parallelism, method == "qlora")
    exchange = collectives(sizes, parallelism, device, tokens, dtype.itemsize, training=True)
    compute = run_seconds(cost, device, dtype) / parallelism.tp_size
    compute += optimizer_seconds(gradient_bytes(sizes, parallelism), device)
    return TrainingPlan(
        method=method,
        recompute=recompute,
        dtype=dtype,
        trained=sizes.trained,
        memory=memory,
        time=PassTime(compute, exchange_seconds(exchange), tokens * parallelism.batches),
        bound_by=bound_by(cost, device, dtype),
        exchange=exchange,
        fits=memory.total <= device.memory,
    )


def _inference_plan(planner: Planner, sizes: Sizes) -> InferencePlan:
    request = planner.request
    device, parallelism, dtype = request.device, request.parallelism, request.dtype
    batch_size, tokens = request.batch_size, request.batch_size * request.sequence_length
    prefill = planner.prefill(batch_size, request.sequence_length)
    held = cache_bytes(prefill.cache)
    decode = planner.model(None, dtype).decode(batch_size, prefill.cache)
    exchange = collectives(sizes, parallelism, device, tokens, dtype.itemsize, training=False)
    of_token = collectives(sizes, parallelism, device, batch_size, dtype.itemsize, training=False)
    memory = inference_memory(sizes, prefill.cost, parallelism)
    seconds = run_seconds(prefill.cost, device, dtype) / parallelism.tp_size
    step = run_seconds(decode, device, dtype) / parallelism.tp_size
    return InferencePlan(
        dtype=dtype,
        memory=memory,
        cache=held,
        cache_per_token=(cache_bytes(prefill.cache) - held) // batch_size,
        prefill=PassTime(seconds, exchange_seconds(exchange), tokens * parallelism.batches),
        decode=PassTime(step, exchange_seconds(of_token), batch_size * parallelism.batches),
        prefill_bound_by=bound_by(prefill.cost, device, dtype),
        decode_bound_by=bound_by(decode, device, dtype),
        exchange=exchange,
        fits=memory.total <= device.memory,
    )


def _longest(config: PreTrainedConfig) -> int:
    """Returns the number of positions of a model, at most `MOST_TOKENS`."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(positions, MOST_TOKENS) if isinstance(positions, int) and positions > 0 else MOST_TOKENS


def _choice(planner: Planner, plan: TrainingPlan) -> Choice:
    return Choice(plan.method, plan.recompute, plan.dtype, planner.request.parallelism.fsdp_size)


def _limits(planner: Planner, inference: InferencePlan | None, training: list[TrainingPlan]) -> list[Limits]:
    request, longest = planner.request, _longest(planner.config)
    memory, length = request.device.memory, request.sequence_length
    limits = []
    if inference is not None:
        sequences = largest(
            lambda n: planner.inference_memory(n, length).total, memory, MOST_SEQUENCES, request.batch_size
        )
        tokens = largest(lambda n: planner.inference_memory(1, n).total, memory, longest, length)
        limits.append(Limits("generation", sequences, tokens))
    for plan in training:
        choice = _choice(planner, plan)
        batch_size = request.batch_size
        sequences = largest(
            lambda n, c=choice: planner.training_memory(c, n, length).total, memory, MOST_SEQUENCES, batch_size
        )
        tokens = largest(lambda n, c=choice: planner.training_memory(c, 1, n).total, memory, longest, length)
        limits.append(Limits(f"training, {plan.method}, recompute {plan.recompute}", sequences, tokens))
    return limits


def _changes(
    planner: Planner, sizes: Sizes, inference: InferencePlan | None, training: list[TrainingPlan]
) -> dict[str, list[Change]]:
    request, found = planner.request, {}
    memory = request.device.memory
    if inference is not None and not inference.fits:
        found["generation"] = inference_changes(sizes, inference.memory, request.dtype, memory)
    for plan in training:
        if not plan.fits:

            def needs(choice: Choice) -> Memory:
                return planner.training_memory(choice, request.batch_size, request.sequence_length)

            name = f"training, {plan.method}, recompute {plan.recompute}"
            four_bits = sizes.experts_in_4_bits > 0 and request.parallelism.keeps_experts
            found[name] = training_changes(_choice(planner, plan), needs, memory, four_bits)
    return found
