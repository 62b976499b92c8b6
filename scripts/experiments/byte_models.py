# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module trains small models that read bytes, from equal weights on equal batches, and measures their routing.

# L layers, N batches, B sequences, S tokens of each, T = N*B*S tokens, E experts
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.data import DataArguments, cut_documents, hold_out
from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.monitoring import entropies, max_violation, mean_experts
from modeling_moe.router import Routing, expert_load
from modeling_moe.utils.errors import UserError

from .python_text import python_documents
from .scoring import cross_entropy


# token id of padding: ids below it are bytes
PAD = 256
EVAL_FRACTION = 0.1
# number of last training steps over which the training loss is averaged
LAST_STEPS = 50
# number of training steps that a value of a curve averages
CURVE_STEPS = 10
# an expert with less than this share of the mean load is starved
STARVED = 0.1


@dataclass
class ByteModelArguments:
    """These arguments name the text, and set the length of the training and the seeds."""

    data: list[str] | None = field(
        default=None,
        metadata={"help": "texts, each as domain=source; without it, Python's own documentation and sources"},
    )
    text_column: str = field(default="text", metadata={"help": "column that contains the text (not for .txt files)"})
    steps: int = field(default=150, metadata={"help": "number of optimizer steps of a run"})
    batch_size: int = field(default=8, metadata={"help": "number of sequences in a batch"})
    length: int = field(default=64, metadata={"help": "number of tokens (bytes) in a sequence"})
    eval_batches: int = field(default=32, metadata={"help": "number of batches of held-out text"})
    seeds: int = field(default=5, metadata={"help": "number of seeds"})
    seed: int = field(
        default=0, metadata={"help": "first seed of weights, batches, held-out text and the routers' noise"}
    )
    workers: int = field(default=1, metadata={"help": "number of runs at a time, each on one thread"})
    runs_file: str | None = field(
        default=None,
        metadata={"help": "JSON Lines file with one line for each finished run; runs in the file are not repeated"},
    )

    def __post_init__(self):
        for name, least in {
            "steps": 1,
            "batch_size": 1,
            "length": 2,
            "eval_batches": 1,
            "seeds": 1,
            "workers": 1,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    @property
    def all_seeds(self) -> range:
        """The seeds of the runs."""
        return range(self.seed, self.seed + self.seeds)

    def settings(self) -> dict[str, Any]:
        """Returns everything that all runs depend on."""
        free = ("seeds", "seed", "workers", "runs_file")
        names = [item.name for item in dataclasses.fields(ByteModelArguments) if item.name not in free]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Corpus:
    """Holds the training bytes and the held-out bytes of each domain."""

    training: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]

    @property
    def fingerprint(self) -> str:
        """Eight digits that differ for different texts."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for name, text in part.items():
                digest.update(f"{name} {len(text)} ".encode() + text.tobytes())
        return digest.hexdigest()[:8]


@dataclass(frozen=True)
class Trained:
    """Holds what one run measured.

    Values are measured on held-out text in evaluation mode, except curves, `train_loss` and `dropped_share`; values
    of the routing are means over layers. Numbers have 5 decimals.

    Attributes:
        text: fingerprint of the text.
        train_loss: loss without router losses, in nats per token, mean of the last 50 training steps.
        held_out_loss: loss without router losses on held-out text, in nats per token.
        max_vio: load of the busiest expert over the mean load, minus 1; only experts with weights are included.
        starved_share: share of the experts with weights whose load is below a tenth of the mean load.
        token_entropy: entropy of a token's probabilities in nats, mean over tokens.
        marginal_entropy: entropy in nats of the mean probabilities.
        mean_experts: number of experts with weights that a token uses, mean over tokens.
        dropped_share: share of dropped assignments, mean of the last 50 training steps; None without a capacity.
        seconds: time of training and evaluation.
        losses, max_vios: training loss and MaxVio of the training batches, each value a mean of ten steps.
    """

    text: str
    train_loss: float
    held_out_loss: float
    max_vio: float
    starved_share: float
    token_entropy: float
    marginal_entropy: float
    mean_experts: float
    dropped_share: float | None
    seconds: float
    losses: list[float]
    max_vios: list[float]


def model_config(fields: dict[str, Any], name: str) -> MoEConfig:
    """Returns the configuration of a model that reads bytes.

    Args:
        fields: arguments of MoEConfig.
        name: name of the configuration in messages.

    Raises:
        UserError: if a field is unknown or has a wrong value.
    """
    known = {item.name for item in dataclasses.fields(MoEConfig)}
    for field_name in fields:
        if field_name not in known:
            raise UserError(f"{name}: MoEConfig has no field {field_name!r}: correct the name")
    every: dict[str, Any] = {"vocab_size": PAD + 1, "pad_token_id": PAD} | fields
    try:
        return MoEConfig(**every)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{name}: {error}") from error


def load_corpus(args: ByteModelArguments, seed: int) -> Corpus:
    """Reads the domains and holds out a tenth of each.

    Args:
        args: arguments that name the text.
        seed: seed of the choice of the held-out text.

    Raises:
        UserError: if a part of a domain is shorter than a sequence.
    """
    if args.data is None:
        domains = python_documents()
    else:
        domains = DataArguments(data=args.data, text_column=args.text_column, max_length=args.length).load()
    corpus = Corpus({}, {})
    for name, documents in domains.items():
        parts = hold_out(cut_documents(documents), EVAL_FRACTION, seed)
        for part, pieces in zip((corpus.training, corpus.held_out), parts, strict=True):
            part[name] = np.frombuffer("".join(pieces["text"]).encode("utf-8"), dtype=np.uint8)
            if len(part[name]) < args.length:
                raise UserError(
                    f"length is {args.length}, but a part of domain {name!r} has {len(part[name])} bytes: lower it"
                )
    return corpus


def batches(
    domains: dict[str, np.ndarray], args: ByteModelArguments, count: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields `count` batches of sequences from random places; the domains take turns.

    A batch holds `input_ids` and `labels` (B, S) and `task_ids` (B,), the index of the domain.
    """
    rng, texts = np.random.default_rng(seed), list(domains.values())
    for number in range(count):
        tasks = (np.arange(args.batch_size) + number * args.batch_size) % len(texts)
        starts = [rng.integers(len(texts[task]) - args.length + 1) for task in tasks]
        rows = [texts[task][start : start + args.length] for task, start in zip(tasks, starts, strict=True)]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, S)
        yield {"input_ids": ids, "labels": ids, "task_ids": torch.from_numpy(tasks.astype(np.int64))}


def build(config: MoEConfig, shared: MoEConfig, seed: int) -> MoEForCausalLM:
    """Returns a new model; all weights outside its routers are those of a model of the configuration `shared`."""
    torch.manual_seed(seed)
    source = MoEForCausalLM(shared).state_dict()
    torch.manual_seed(seed)
    new = MoEForCausalLM(config)
    own = new.state_dict()
    same = {
        name: value
        for name, value in source.items()
        if ".mlp.gate." not in name and name in own and own[name].shape == value.shape
    }
    new.load_state_dict(same, strict=False)
    return new


@contextmanager
def recorded(model: MoEForCausalLM) -> Iterator[list[list[Routing]]]:
    """Yields a list for each sparse layer; each call of the model appends the layer's routing."""
    blocks = model.model.sparse_blocks()
    routings: list[list[Routing]] = [[] for _ in blocks]

    def keep(layer: list[Routing], module, inputs, routing: Routing) -> None:
        layer.append(routing)

    hooks = [
        block.gate.register_forward_hook(partial(keep, layer)) for block, layer in zip(blocks, routings, strict=True)
    ]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


def joined(routings: list[Routing]) -> Routing:
    """Concatenates routings into one of all tokens, without the selection probabilities, which only training has."""
    return Routing(*(torch.cat(parts) for parts in list(zip(*routings, strict=True))[:4]))


def starved_share(load: torch.Tensor) -> torch.Tensor:
    """Returns for each layer the share of experts whose load is below a tenth of the layer's mean load.

    Args:
        load: (L, E) number of assignments.
    """
    load = load.double()
    return (load < STARVED * load.mean(dim=-1, keepdim=True)).double().mean(dim=-1)


@torch.no_grad()
def held_out_scores(model: MoEForCausalLM, corpus: Corpus, args: ByteModelArguments, seed: int) -> dict[str, float]:
    """Returns the values of [`Trained`] that are measured on held-out text."""
    model.eval()
    losses = []
    with recorded(model) as layers:
        for batch in batches(corpus.held_out, args, args.eval_batches, seed + 1):
            logits = model(input_ids=batch["input_ids"], task_ids=batch["task_ids"], use_cache=False).logits
            losses.append(cross_entropy(logits, batch["labels"]))
    routings, experts = [joined(layer) for layer in layers], model.config.num_experts
    load = torch.stack([expert_load(routing) for routing in routings])[:, :experts]
    entropy = torch.stack([torch.stack(entropies(routing)) for routing in routings]).mean(dim=0)
    return {
        "held_out_loss": float(np.mean(losses)),
        "max_vio": max_violation(load).mean().item(),
        "starved_share": starved_share(load).mean().item(),
        "token_entropy": entropy[0].item(),
        "marginal_entropy": entropy[1].item(),
        "mean_experts": torch.stack([mean_experts(routing, None, experts) for routing in routings]).mean().item(),
    }


def train(model: MoEForCausalLM, corpus: Corpus, args: ByteModelArguments, learning_rate: float, seed: int) -> Trained:
    """Trains a model on one thread with AdamW, and measures it.

    Args:
        model: a new model.
        corpus: text to train on, and held-out text.
        args: arguments of the training.
        learning_rate: learning rate of AdamW.
        seed: seed of the batches and of the routers' noise.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(model.train(), corpus, args, learning_rate, seed)
    finally:
        torch.set_num_threads(threads)


def _train(
    model: MoEForCausalLM, corpus: Corpus, args: ByteModelArguments, learning_rate: float, seed: int
) -> Trained:
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    torch.manual_seed(seed)
    losses, max_vios, dropped = [], [], []
    for batch in batches(corpus.training, args, args.steps, seed):
        outputs = model(**batch, use_cache=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers()
        losses.append(cross_entropy(outputs.logits.detach(), batch["labels"]))
        max_vios.append(max_violation(outputs.expert_load[:, : model.config.num_experts]).mean().item())
        if outputs.dropped_share is not None:
            dropped.append(outputs.dropped_share.mean().item())
    scores = held_out_scores(model, corpus, args, seed)
    return Trained(
        text=corpus.fingerprint,
        train_loss=round(float(np.mean(losses[-LAST_STEPS:])), 5),
        dropped_share=round(float(np.mean(dropped[-LAST_STEPS:])), 5) if dropped else None,
        seconds=round(time.perf_counter() - began, 2),
        losses=curve(losses),
        max_vios=curve(max_vios),
        **{name: round(value, 5) for name, value in scores.items()},
    )


def curve(values: list[float]) -> list[float]:
    """Returns the means of each ten values; the last mean may have fewer values."""
    starts = range(0, len(values), CURVE_STEPS)
    return [round(float(np.mean(values[start : start + CURVE_STEPS])), 5) for start in starts]
