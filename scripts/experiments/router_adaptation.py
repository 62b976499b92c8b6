# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment asks whether routers that were meta-trained adapt to an unseen domain from 64 tokens by one gradient step.

A domain is a language. A seed splits the languages into those that the model is trained on, those on which each arm's step size
is chosen, and held-out ones. The arms start from one trained model. Everything but the routers is frozen then.

# B rows, S tokens per row
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.training import adapt_router, meta_gradient, router_parameters
from modeling_moe.utils.errors import UserError

from .files import refuse_missing_folders
from .intervals import Difference, holm, paired
from .language_words import LANGUAGES, language_bytes, refuse_missing_languages
from .runs import RunsFile, run_all
from .scoring import cross_entropy
from .small_models import loss_on, means, mixed_rows, new_model, one_thread, rows_of, train


VALIDATION_LANGUAGES, HELD_OUT_LANGUAGES = 6, 8
# sizes of the inner step to choose from
RATES = (0.3, 1.0, 3.0, 10.0, 30.0)
# name of an arm -> name of the routers, and whether they are adapted
ARMS = {
    "frozen": ("frozen", False),
    "frozen, one step": ("frozen", True),
    "router training": ("plain", False),
    "router training, one step": ("plain", True),
    "meta-training": ("meta", False),
    "meta-training, one step": ("meta", True),
}
# the frozen routers, with the support before each row of the query, which costs a longer context
IN_CONTEXT = "frozen, support in the context"
# pairs of arms that are compared; the first two are the question
PAIRS = (
    ("meta-training, one step", "frozen"),
    ("meta-training, one step", "router training, one step"),
    ("meta-training, one step", "router training"),
    ("router training, one step", "router training"),
    ("frozen, one step", "frozen"),
    ("meta-training, one step", IN_CONTEXT),
)


@dataclass
class AdaptationArguments:
    """These arguments set the length of the training and the number of seeds."""

    seeds: int = field(
        default=8, metadata={"help": "number of seeds, each with other weights and other held-out languages"}
    )
    steps: int = field(default=1200, metadata={"help": "number of steps in which the whole model is trained"})
    router_steps: int = field(
        default=200, metadata={"help": "number of further steps in which the routers are trained"}
    )
    rows: int = field(default=8, metadata={"help": "number of rows in a step; in meta-training each row is a task"})
    length: int = field(default=32, metadata={"help": "number of query tokens (bytes) in a row"})
    support: int = field(default=64, metadata={"help": "number of tokens that routers are adapted on"})
    learning_rate: float = field(default=3e-3, metadata={"help": "learning rate of AdamW for the whole model"})
    router_learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of AdamW for the routers"})
    draws: int = field(
        default=6, metadata={"help": "number of supports drawn from each language, each adapted on alone"}
    )
    queries: int = field(default=32, metadata={"help": "number of held-out rows of each language"})
    method: str = field(default="fomaml", metadata={"help": "outer gradient: fomaml or reptile"})
    workers: int = field(default=1, metadata={"help": "number of runs at a time, each on one thread"})
    runs_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file that keeps finished runs, which are not repeated"}
    )
    markdown: str | None = field(default=None, metadata={"help": "file for the tables in Markdown"})

    def __post_init__(self):
        for name in ("steps", "router_steps", "rows", "draws", "queries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.seeds < 2:
            raise UserError(f"seeds is {self.seeds}: an interval needs at least 2")
        refuse_missing_folders(self, "runs_file", "markdown")


@dataclass(frozen=True)
class Run:
    """Holds the losses of all arms for one seed.

    Attributes:
        seed: the seed.
        held_out: names of the held-out languages.
        rates: step size that was chosen for the routers of an arm ("frozen", "plain", "meta").
        losses: loss of each arm on each held-out language in nats per byte, the mean over the supports.
    """

    seed: int
    held_out: list[str]
    rates: dict[str, float]
    losses: dict[str, dict[str, float]]


class Split(NamedTuple):
    """Names the languages of one seed."""

    training: list[str]
    validation: list[str]
    held_out: list[str]


def split(seed: int) -> Split:
    """Splits the languages at random."""
    order = [list(LANGUAGES)[i] for i in np.random.default_rng(seed).permutation(len(LANGUAGES))]
    first, second = HELD_OUT_LANGUAGES, HELD_OUT_LANGUAGES + VALIDATION_LANGUAGES
    return Split(order[second:], order[first:second], order[:first])


def supports_and_query(language: str, args: AdaptationArguments, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns supports (1, S) of a language, and rows (B, S) of other words of it, the same ones for all arms of a seed."""
    text, held_out = language_bytes(language)
    rng = np.random.default_rng((seed, list(LANGUAGES).index(language)))
    query = rows_of(held_out, args.queries, args.length, rng)
    return [rows_of(text, 1, args.support, rng) for _ in range(args.draws)], query


def adapted_loss(
    model: MoEForCausalLM, languages: Sequence[str], rate: float | None, args: AdaptationArguments, seed: int
) -> dict[str, float]:
    """Returns the loss on each language, the mean over supports to which the routers are adapted; without a rate they are not."""
    losses = {}
    for language in languages:
        supports, query = supports_and_query(language, args, seed)
        if rate is None:
            losses[language] = loss_on(model, query)
            continue
        found = []
        for support in supports:
            with adapt_router(model, support, learning_rate=rate):
                found.append(loss_on(model, query))
        losses[language] = sum(found) / len(found)
    return losses


@torch.no_grad()
def loss_in_context(
    model: MoEForCausalLM, languages: Sequence[str], args: AdaptationArguments, seed: int
) -> dict[str, float]:
    """Returns the loss on each language of the query, the mean over supports that stand before it in the context."""
    losses = {}
    model.eval()
    for language in languages:
        supports, query = supports_and_query(language, args, seed)
        found = []
        for support in supports:
            rows = torch.cat([support.expand(len(query), -1), query], dim=1)
            logits = model(input_ids=rows, use_cache=False).logits
            found.append(cross_entropy(logits[:, args.support :], query))
        losses[language] = sum(found) / len(found)
    return losses


def best_rate(model: MoEForCausalLM, languages: Sequence[str], args: AdaptationArguments, seed: int) -> float:
    """Returns the step size with the lowest loss after one step on the languages for the choice."""
    return min(RATES, key=lambda rate: means(adapted_loss(model, languages, rate, args, seed)))


def meta_train(
    model: MoEForCausalLM, texts: Sequence[np.ndarray], rate: float, args: AdaptationArguments, seed: int
) -> None:
    """Trains the routers so that one step on a support lowers the loss of other tokens of its domain."""
    rng = np.random.default_rng((seed, 2))
    routers = list(router_parameters(model).values())
    optimizer = torch.optim.AdamW(routers, lr=args.router_learning_rate)
    for _ in range(args.router_steps):
        model.train()
        for text in rng.integers(len(texts), size=args.rows):
            support, query = (rows_of(texts[text], 1, length, rng) for length in (args.support, args.length))
            meta_gradient(model, support, query, learning_rate=rate, method=args.method, weight=1 / args.rows)
        torch.nn.utils.clip_grad_norm_(routers, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers()


def run_seed(seed: int, args: AdaptationArguments) -> Run:
    """Trains all arms of a seed, on one thread."""
    with one_thread():
        languages = split(seed)
        texts = [language_bytes(language)[0] for language in languages.training]
        # as many tokens as a task of meta-training has
        length = args.support + args.length
        frozen = new_model(seed)
        batches = mixed_rows(texts, args.rows, length, args.steps, np.random.default_rng((seed, 1)))
        train(frozen, batches, args.learning_rate)
        rate = best_rate(frozen, languages.validation, args, seed)

        plain = copy.deepcopy(frozen)
        batches = mixed_rows(texts, args.rows, length, args.router_steps, np.random.default_rng((seed, 2)))
        train(plain, batches, args.router_learning_rate, parameters=list(router_parameters(plain).values()))
        meta = copy.deepcopy(frozen)
        meta_train(meta, texts, rate, args, seed)

        models = {"frozen": frozen, "plain": plain, "meta": meta}
        rates = {name: best_rate(model, languages.validation, args, seed) for name, model in models.items()}
        losses = {
            arm: adapted_loss(models[name], languages.held_out, rates[name] if adapts else None, args, seed)
            for arm, (name, adapts) in ARMS.items()
        }
        losses[IN_CONTEXT] = loss_in_context(frozen, languages.held_out, args, seed)
        return Run(seed, languages.held_out, rates, losses)


def compare(args: AdaptationArguments) -> list[Run]:
    """Trains the seeds that the runs file lacks, and returns all."""
    free = ("seeds", "workers", "runs_file", "markdown")
    file = RunsFile(args.runs_file, {name: value for name, value in asdict(args).items() if name not in free})
    done = {run.seed: run for run in file.read(lambda run: Run(**run))}

    def finish(run: Run) -> None:
        done[run.seed] = run
        file.add(asdict(run))

    missing = [(seed, args) for seed in range(args.seeds) if seed not in done]
    if missing:
        refuse_missing_languages()
    run_all(missing, run_seed, args.workers, finish, file, "seeds")
    return [done[seed] for seed in range(args.seeds)]


def comparisons(runs: Sequence[Run]) -> list[tuple[str, str, Difference, float]]:
    """Returns for each pair of arms the paired difference of the loss, and the p-value adjusted by Holm's method."""
    values = {arm: [means(run.losses[arm]) for run in runs] for arm in (*ARMS, IN_CONTEXT)}
    found = [paired(values[first], values[second]) for first, second in PAIRS]
    adjusted = holm([difference.p_value for difference in found])
    return [(*pair, difference, p) for pair, difference, p in zip(PAIRS, found, adjusted, strict=True)]


def markdown(runs: Sequence[Run]) -> str:
    """Returns the tables in GitHub Markdown."""
    lines = ["| routers | held-out loss, nats per byte | step sizes chosen |", "|---|---:|---|"]
    for arm, (name, adapts) in (ARMS | {IN_CONTEXT: ("frozen", False)}).items():
        mean = sum(means(run.losses[arm]) for run in runs) / len(runs)
        rates = ", ".join(f"{rate:g}" for rate in sorted({run.rates[name] for run in runs})) if adapts else ""
        lines.append(f"| {arm} | {mean:.4f} | {rates} |")
    lines += ["", "| loss of | minus loss of | difference, 95 % interval | adjusted p |", "|---|---|---:|---:|"]
    for first, second, difference, p_value in comparisons(runs):
        shown = f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
        lines.append(f"| {first} | {second} | {shown} | {p_value:.2g} |")
    return "\n".join(lines) + "\n"
