# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment trains the routers of the catalogue on equal batches, from equal weights, and measures them.

# L layers, N batches, B sequences, S tokens of each, T = N*B*S tokens, E experts
"""

import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.data import DataArguments, cut_documents, hold_out
from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.monitoring import entropies, max_violation, mean_experts
from modeling_moe.router import Routing, expert_load
from modeling_moe.router_catalogue import router_class
from modeling_moe.utils.errors import UserError

from .files import refuse_missing_folders
from .python_text import python_documents
from .runs import RunsFile, run_all
from .scoring import cross_entropy


ROUTERS_FILE = Path(__file__).resolve().parents[2] / "configuration" / "routers.yaml"
# token id of padding: ids below it are bytes
PAD = 256
EVAL_FRACTION = 0.1
# number of last training steps over which the training loss is averaged
LAST_STEPS = 50
# keys of a router in the YAML file, and the types of their values
ENTRY_KEYS = {"name": str, "fields": dict, "source": str, "highlight": bool}


@dataclass
class ComparisonArguments:
    """These arguments name the routers and the text, and set the length of the training."""

    routers_file: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with the model's fields, and name, fields and source of each router; without it, "
            "configuration/routers.yaml of this repository"
        },
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "names of the routers to train; all routers without it"}
    )
    data: list[str] | None = field(
        default=None,
        metadata={"help": "texts, each as domain=source; without it, Python's own documentation and sources"},
    )
    text_column: str = field(default="text", metadata={"help": "column that contains the text (not for .txt files)"})
    steps: int = field(default=300, metadata={"help": "number of optimizer steps of each router"})
    batch_size: int = field(default=8, metadata={"help": "number of sequences in a batch"})
    length: int = field(default=128, metadata={"help": "number of tokens (bytes) in a sequence"})
    eval_batches: int = field(default=16, metadata={"help": "number of batches of held-out text"})
    learning_rate: float = field(default=3e-3, metadata={"help": "learning rate of AdamW"})
    seed: int = field(default=0, metadata={"help": "seed of weights, batches and the routers' noise"})
    workers: int = field(default=1, metadata={"help": "number of routers trained at a time, each on one thread"})
    runs_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON Lines file with one line for each trained router; routers in the file are not trained again"
        },
    )
    output_json: str | None = field(default=None, metadata={"help": "JSON file for the results, including the curves"})
    plot: str | None = field(default=None, metadata={"help": "PNG file for a plot of loss and MaxVio over the steps"})
    markdown: str | None = field(default=None, metadata={"help": "file for the table in GitHub Markdown"})

    def __post_init__(self):
        for name, least in {"steps": 1, "batch_size": 1, "length": 2, "eval_batches": 1, "workers": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        refuse_missing_folders(self, "runs_file", "output_json", "plot", "markdown")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("plot needs matplotlib: pip install 'modeling-moe[plot]'")


@dataclass(frozen=True)
class RouterEntry:
    """Describes one configuration to train.

    Attributes:
        name: name in the table.
        fields: fields of the model's configuration that this router sets.
        source: paper or model that published the router.
        highlight: whether its curves are drawn in colour.
    """

    name: str
    fields: dict[str, Any]
    source: str
    highlight: bool = False


@dataclass(frozen=True)
class RouterResult:
    """Holds the results of one configuration.

    Values are measured on held-out text in evaluation mode, except curves, `train_loss` and `dropped_share`; values
    of the routing are means over layers.

    Attributes:
        name, fields, source, highlight: the fields of [`RouterEntry`].
        causal: whether a token's experts are independent of later tokens, in training and in evaluation.
        train_loss: loss without router losses, in nats per token, mean of the last 50 training steps.
        held_out_loss: loss without router losses on held-out text, in nats per token.
        max_vio: load of the busiest expert over the mean load, minus 1; only experts with weights are included.
        token_entropy: entropy of a token's probabilities in nats, mean over tokens.
        marginal_entropy: entropy in nats of the mean probabilities.
        mean_experts: number of experts with weights that a token uses, mean over tokens.
        dropped_share: share of dropped assignments, mean of the last 50 training steps; None without a capacity.
        seconds: time of training and evaluation.
        losses: training loss of each step.
        max_vios: MaxVio of each training step's batch.
    """

    name: str
    fields: dict[str, Any]
    source: str
    highlight: bool
    causal: bool
    train_loss: float
    held_out_loss: float
    max_vio: float
    token_entropy: float
    marginal_entropy: float
    mean_experts: float
    dropped_share: float | None
    seconds: float
    losses: list[float]
    max_vios: list[float]

    @property
    def config_line(self) -> str:
        """The fields as arguments of `MoEConfig`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.fields.items())


@dataclass(frozen=True)
class Corpus:
    """Holds the training bytes and the held-out bytes of each domain."""

    training: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]


def load_entries(path: str) -> tuple[dict[str, Any], list[RouterEntry]]:
    """Reads the model's fields and the routers from a YAML file.

    Raises:
        UserError: if the file does not exist or is malformed.
    """
    if not Path(path).is_file():
        raise UserError(f"routers_file {path} does not exist: correct the path")
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"routers_file {path} is not YAML: {error}") from error
    if not isinstance(content, dict) or set(content) != {"model", "routers"}:
        raise UserError(f"routers_file {path} must contain 'model' (fields) and 'routers' (a list), and nothing else")
    model, routers = content["model"], content["routers"]
    if not isinstance(model, dict) or not isinstance(routers, list) or not routers:
        raise UserError(f"routers_file {path}: 'model' must be a mapping of fields and 'routers' a non-empty list")
    entries = []
    for number, router in enumerate(routers, start=1):
        entries.append(_entry(router, f"routers_file {path}, router {number}"))
        if any(entry.name == entries[-1].name for entry in entries[:-1]):
            raise UserError(
                f"routers_file {path}: two routers have the name {entries[-1].name!r}: give each a different name"
            )
    return model, entries


def _entry(router: Any, where: str) -> RouterEntry:
    if not isinstance(router, dict) or not {"name", "fields", "source"} <= set(router):
        raise UserError(f"{where}: it must have 'name', 'fields' and 'source'")
    for key, value in router.items():
        if key not in ENTRY_KEYS:
            raise UserError(f"{where}: {key!r} is unknown: choose one of {', '.join(ENTRY_KEYS)}")
        if not isinstance(value, ENTRY_KEYS[key]):
            raise UserError(f"{where}: {key!r} must be a {ENTRY_KEYS[key].__name__}")
    return RouterEntry(**router)


def router_config(model: dict[str, Any], entry: RouterEntry) -> MoEConfig:
    """Returns the configuration of the model with one router.

    Raises:
        UserError: if a field is unknown or has a wrong value.
    """
    known = {item.name for item in dataclasses.fields(MoEConfig)}
    for name in [*model, *entry.fields]:
        if name not in known:
            raise UserError(f"router {entry.name!r}: MoEConfig has no field {name!r}: correct the name")
    fields: dict[str, Any] = {"vocab_size": PAD + 1, "pad_token_id": PAD} | model | entry.fields
    try:
        return MoEConfig(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"router {entry.name!r}: {error}") from error


def load_corpus(args: ComparisonArguments) -> Corpus:
    """Reads the domains and holds out a tenth of each.

    Raises:
        UserError: if a part of a domain is shorter than a sequence.
    """
    if args.data is None:
        domains = python_documents()
    else:
        domains = DataArguments(data=args.data, text_column=args.text_column, max_length=args.length).load()
    corpus = Corpus({}, {})
    for name, documents in domains.items():
        parts = hold_out(cut_documents(documents), EVAL_FRACTION, args.seed)
        for part, pieces in zip((corpus.training, corpus.held_out), parts, strict=True):
            part[name] = np.frombuffer("".join(pieces["text"]).encode("utf-8"), dtype=np.uint8)
            if len(part[name]) < args.length:
                raise UserError(
                    f"length is {args.length}, but a part of domain {name!r} has {len(part[name])} bytes: lower it"
                )
    return corpus


def batches(
    domains: dict[str, np.ndarray], args: ComparisonArguments, count: int, seed: int
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


def build(config: MoEConfig, model: dict[str, Any], seed: int) -> MoEForCausalLM:
    """Returns a new model; all weights outside its routers are equal for every router."""
    torch.manual_seed(seed)
    shared = MoEForCausalLM(router_config(model, RouterEntry("model", {}, ""))).state_dict()
    torch.manual_seed(seed)
    new = MoEForCausalLM(config)
    own = new.state_dict()
    same = {
        name: value
        for name, value in shared.items()
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


@torch.no_grad()
def held_out_scores(model: MoEForCausalLM, corpus: Corpus, args: ComparisonArguments) -> dict[str, float]:
    """Returns the values of [`RouterResult`] that are measured on held-out text."""
    model.eval()
    losses = []
    with recorded(model) as layers:
        for batch in batches(corpus.held_out, args, args.eval_batches, args.seed + 1):
            logits = model(input_ids=batch["input_ids"], task_ids=batch["task_ids"], use_cache=False).logits
            losses.append(cross_entropy(logits, batch["labels"]))
    routings, experts = [joined(layer) for layer in layers], model.config.num_experts
    load = torch.stack([expert_load(routing) for routing in routings])[:, :experts]
    entropy = torch.stack([torch.stack(entropies(routing)) for routing in routings]).mean(dim=0)
    return {
        "held_out_loss": float(np.mean(losses)),
        "max_vio": max_violation(load).mean().item(),
        "token_entropy": entropy[0].item(),
        "marginal_entropy": entropy[1].item(),
        "mean_experts": torch.stack([mean_experts(routing, None, experts) for routing in routings]).mean().item(),
    }


def train_router(
    entry: RouterEntry, model_fields: dict[str, Any], corpus: Corpus, args: ComparisonArguments
) -> RouterResult:
    """Trains a new model with one router on one thread, and measures it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train_router(entry, model_fields, corpus, args)
    finally:
        torch.set_num_threads(threads)


def _train_router(
    entry: RouterEntry, model_fields: dict[str, Any], corpus: Corpus, args: ComparisonArguments
) -> RouterResult:
    began = time.perf_counter()
    config = router_config(model_fields, entry)
    model = build(config, model_fields, args.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    torch.manual_seed(args.seed)
    losses, max_vios, dropped = [], [], []
    for batch in batches(corpus.training, args, args.steps, args.seed):
        outputs = model(**batch, use_cache=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers()
        losses.append(cross_entropy(outputs.logits.detach(), batch["labels"]))
        max_vios.append(max_violation(outputs.expert_load[:, : config.num_experts]).mean().item())
        if outputs.dropped_share is not None:
            dropped.append(outputs.dropped_share.mean().item())
    scores = held_out_scores(model, corpus, args)
    return RouterResult(
        **asdict(entry),
        causal=router_class(config).causal and config.capacity_priority == "token",
        train_loss=float(np.mean(losses[-LAST_STEPS:])),
        dropped_share=float(np.mean(dropped[-LAST_STEPS:])) if dropped else None,
        seconds=time.perf_counter() - began,
        losses=losses,
        max_vios=max_vios,
        **scores,
    )


def compare_routers(args: ComparisonArguments) -> list[RouterResult]:
    """Trains every router of `routers_file`, or those of `only`; results are in the order of the file.

    Raises:
        UserError: if an argument or a file cannot be used; nothing is trained then.
    """
    routers_file = args.routers_file or str(ROUTERS_FILE)
    model, entries = load_entries(routers_file)
    for name in args.only or []:
        if all(entry.name != name for entry in entries):
            names = ", ".join(entry.name for entry in entries)
            raise UserError(f"only {name!r} is not in {routers_file}: choose one of {names}")
    entries = [entry for entry in entries if args.only is None or entry.name in args.only]
    configs = [router_config(model, entry) for entry in entries]
    corpus = load_corpus(args)
    for entry, config in zip(entries, configs, strict=True):
        if config.router_type in ("task", "mmoe") and config.num_tasks < len(corpus.training):
            raise UserError(
                f"router {entry.name!r} has num_tasks={config.num_tasks}, but the data have {len(corpus.training)} domains, "
                "each of which is a task: raise it"
            )
    file = RunsFile(args.runs_file, _settings(args, model))
    done = {_key(run): run for run in file.read(lambda run: RouterResult(**run))}

    def finish(run: RouterResult) -> None:
        done[_key(run)] = run
        file.add(asdict(run))

    missing = [(entry, model, corpus, args) for entry in entries if _key(entry) not in done]
    run_all(missing, train_router, args.workers, finish, file, "routers")
    return [done[_key(entry)] for entry in entries]


def _settings(args: ComparisonArguments, model: dict[str, Any]) -> dict[str, Any]:
    """Returns everything that all runs depend on."""
    free = ("routers_file", "only", "workers", "runs_file", "output_json", "plot", "markdown")
    return {name: value for name, value in asdict(args).items() if name not in free} | {"model": model}


def _key(entry: RouterEntry | RouterResult) -> str:
    return json.dumps([entry.name, entry.fields, entry.source, entry.highlight], sort_keys=True)


def markdown_table(results: list[RouterResult]) -> str:
    """Returns the table in GitHub Markdown."""
    columns = ["router", "config line", "causal", "source", "held-out", "experts", "MaxVio", "H token / marginal"]
    lines = [columns, ["---"] * 4 + ["---:"] * 4]
    for result in results:
        row = [result.name, f"`{result.config_line}`", "yes" if result.causal else "no", result.source]
        row += [f"{result.held_out_loss:.3f}", f"{result.mean_experts:.1f}", f"{result.max_vio:.2f}"]
        row += [f"{result.token_entropy:.2f} / {result.marginal_entropy:.2f}"]
        lines.append([cell.replace("|", "\\|") for cell in row])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def smoothed(values: list[float], window: int = 10) -> np.ndarray:
    """Returns for each value the mean of it and up to `window - 1` values before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def plot_curves(path: str, results: list[RouterResult]) -> None:
    """Draws training loss and MaxVio over the steps; if some results are highlighted, the others are grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    some = any(result.highlight for result in results)
    for result in sorted(results, key=lambda result: result.highlight):
        style: dict[str, Any] = {"color": "0.8", "linewidth": 0.8}
        if result.highlight or not some:
            style = {"label": result.name, "linewidth": 1.6}
        for panel, values in zip(panels, (result.losses, result.max_vios), strict=True):
            panel.plot(range(1, len(values) + 1), smoothed(values), **style)
    panels[0].set(xlabel="step", ylabel="train loss (nats per token)")
    panels[1].set(xlabel="step", ylabel="MaxVio of the load (0: balanced)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / 2), fontsize="small")
    figure.savefig(path, dpi=130, format="png")
