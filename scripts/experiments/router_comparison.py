# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Trains the routers of the catalogue one after another on the same batches, from the same weights, and measures them.

# L layers, N batches, B sequences, S tokens of each, T = N*B*S tokens, E experts
"""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.data.documents import DataArguments, cut_documents, hold_out
from modeling_moe.evaluation.routing_metrics import entropies, max_violation, mean_experts
from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.router import Routing, expert_load
from modeling_moe.router_catalogue import router_class
from modeling_moe.utils.errors import UserError

from .runs import RunsFile, run_all


PAD = 256
EVAL_FRACTION = 0.1
LAST_STEPS = 50
SOURCE_MODULES = (
    "argparse",
    "dataclasses",
    "difflib",
    "doctest",
    "inspect",
    "logging",
    "pdb",
    "pydoc",
    "statistics",
    "subprocess",
    "tarfile",
    "threading",
    "typing",
    "unittest.mock",
)
ENTRY_KEYS = {"name": str, "fields": dict, "source": str, "highlight": bool}


@dataclass
class ComparisonArguments:
    """Which routers to train, on what, and for how long."""

    routers_file: str = field(
        default="configuration/routers.yaml",
        metadata={"help": "YAML: the model's fields, and for each router its name, fields and source"},
    )
    only: list[str] | None = field(default=None, metadata={"help": "names of the routers to train; all if not given"})
    data: list[str] | None = field(
        default=None,
        metadata={"help": "domain=source ... as of eval_lm.py; if not given, Python's own documentation and sources"},
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the text (not for .txt)"})
    steps: int = field(default=300, metadata={"help": "optimizer steps of each router"})
    batch_size: int = field(default=8, metadata={"help": "sequences of one step"})
    length: int = field(default=128, metadata={"help": "tokens (bytes) of a sequence"})
    eval_batches: int = field(default=16, metadata={"help": "batches of held-out text"})
    learning_rate: float = field(default=3e-3, metadata={"help": "of AdamW"})
    seed: int = field(default=0, metadata={"help": "of weights, batches and the routers' noise"})
    workers: int = field(default=1, metadata={"help": "routers trained at a time, each by one thread"})
    runs_file: str | None = field(
        default=None,
        metadata={"help": "JSON lines, one for each router that is trained: those there are not trained again"},
    )
    output_json: str | None = field(default=None, metadata={"help": "file for the results, curves included"})
    plot: str | None = field(default=None, metadata={"help": "PNG of loss and MaxVio over the steps"})
    markdown: str | None = field(default=None, metadata={"help": "file for the table as GitHub markdown"})

    def __post_init__(self):
        for name, least in {"steps": 1, "batch_size": 1, "length": 2, "eval_batches": 1, "workers": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        for name in ("runs_file", "output_json", "plot", "markdown"):
            path = getattr(self, name)
            if path is not None and not Path(path).parent.is_dir():
                raise UserError(f"{name} {path}: make the folder {Path(path).parent} first")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("plot needs matplotlib: pip install 'modeling-moe[plot]'")


@dataclass(frozen=True)
class RouterEntry:
    """One configuration to train.

    Attributes:
        name: how the table calls it.
        fields: what it changes in the model's configuration.
        source: paper or model it is from.
        highlight: draw its curves in colour.
    """

    name: str
    fields: dict[str, Any]
    source: str
    highlight: bool = False


@dataclass(frozen=True)
class RouterResult:
    """What came of one configuration. All but the curves and `dropped_share` is measured on held-out text, in evaluation,
    as the mean over the layers.

    Attributes:
        name, fields, source, highlight: of [`RouterEntry`].
        causal: whether a token's experts depend on no later token, in training and in evaluation.
        train_loss: nats per token, router losses not included, the mean of the last 50 steps.
        held_out_loss: the same on held-out text.
        max_vio: load of the busiest expert with weights over their mean load, less 1.
        token_entropy: nats, mean over the tokens.
        marginal_entropy: nats, of the mean probabilities.
        mean_experts: experts with weights that a token uses.
        dropped_share: of the assignments, the mean of the last 50 steps of training; None without a capacity.
        seconds: of training and evaluation.
        losses: train loss of each step.
        max_vios: MaxVio of each step's batch.
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
    """Bytes of each domain, to train on and held out."""

    training: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]


def load_entries(path: str) -> tuple[dict[str, Any], list[RouterEntry]]:
    """The model's fields and the routers of a YAML file.

    Raises:
        UserError: for a file that is not of that form.
    """
    if not Path(path).is_file():
        raise UserError(f"routers_file {path} does not exist: correct the path")
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"routers_file {path} is not YAML: {error}") from error
    if not isinstance(content, dict) or set(content) != {"model", "routers"}:
        raise UserError(f"routers_file {path} must hold 'model' (fields) and 'routers' (a list), and nothing else")
    model, routers = content["model"], content["routers"]
    if not isinstance(model, dict) or not isinstance(routers, list) or not routers:
        raise UserError(
            f"routers_file {path}: 'model' must be a mapping of fields and 'routers' a list that is not empty"
        )
    entries = []
    for number, router in enumerate(routers, start=1):
        entries.append(_entry(router, f"routers_file {path}, router {number}"))
        if any(entry.name == entries[-1].name for entry in entries[:-1]):
            raise UserError(
                f"routers_file {path}: the name {entries[-1].name!r} comes twice: give each router its own"
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
    """Configuration of the model with one router.

    Raises:
        UserError: if it names a field that there is not, or one has a wrong value.
    """
    known = {item.name for item in dataclasses.fields(MoEConfig)}
    for name in [*model, *entry.fields]:
        if name not in known:
            raise UserError(f"router {entry.name!r}: MoEConfig has no field {name!r}: correct it")
    try:
        return MoEConfig(**({"vocab_size": PAD + 1, "pad_token_id": PAD} | model | entry.fields))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"router {entry.name!r}: {error}") from error


def python_documents() -> dict[str, datasets.Dataset]:
    """What every Python brings: the text of its language reference, and modules of its library."""
    from pydoc_data.topics import topics

    sources = [inspect.getsource(importlib.import_module(module)) for module in SOURCE_MODULES]
    texts = {"documentation": list(topics.values()), "code": sources}
    return {name: datasets.Dataset.from_dict({"text": documents}) for name, documents in texts.items()}


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
                    f"length {args.length} is more than a part of domain {name!r} has bytes ({len(part[name])}): lower it"
                )
    return corpus


def batches(
    domains: dict[str, np.ndarray], args: ComparisonArguments, count: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`count` batches of sequences from random places, the domains taking turns: `input_ids`, `labels`, `task_ids`."""
    rng, texts = np.random.default_rng(seed), list(domains.values())
    for number in range(count):
        tasks = (np.arange(args.batch_size) + number * args.batch_size) % len(texts)
        starts = [rng.integers(len(texts[task]) - args.length + 1) for task in tasks]
        rows = [texts[task][start : start + args.length] for task, start in zip(tasks, starts, strict=True)]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, S)
        yield {"input_ids": ids, "labels": ids, "task_ids": torch.from_numpy(tasks.astype(np.int64))}


def build(config: MoEConfig, model: dict[str, Any], seed: int) -> MoEForCausalLM:
    """A new model whose weights, those of its routers aside, are the same for every router."""
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


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Nats per token of logits (B, S, V), the labels (B, S) shifted here."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


@contextmanager
def recorded(model: MoEForCausalLM) -> Iterator[list[list[Routing]]]:
    """Yields a list for each sparse layer, which fills with the layer's routings."""
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
    """One routing of all tokens; without `selection_probability`, which evaluation does not have."""
    return Routing(*(torch.cat(parts) for parts in list(zip(*routings, strict=True))[:4]))


@torch.no_grad()
def held_out_scores(model: MoEForCausalLM, corpus: Corpus, args: ComparisonArguments) -> dict[str, float]:
    """What [`RouterResult`] tells of held-out text."""
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
    """Trains a new model with one router, on one thread, and measures it."""
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
    """Trains every router of `routers_file`, or those of `only`; results in the order of the file.

    Raises:
        UserError: for an argument or a file that cannot work, before anything is trained.
    """
    model, entries = load_entries(args.routers_file)
    for name in args.only or []:
        if all(entry.name != name for entry in entries):
            names = ", ".join(entry.name for entry in entries)
            raise UserError(f"only {name!r} is not in {args.routers_file}: choose one of {names}")
    entries = [entry for entry in entries if args.only is None or entry.name in args.only]
    configs = [router_config(model, entry) for entry in entries]
    corpus = load_corpus(args)
    for entry, config in zip(entries, configs, strict=True):
        if config.router_type in ("task", "mmoe") and config.num_tasks < len(corpus.training):
            raise UserError(
                f"router {entry.name!r} has num_tasks={config.num_tasks} and the data {len(corpus.training)} domains, each "
                "of which is a task: raise it"
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
    """All that a run depends on, beside the router's entry."""
    free = ("routers_file", "only", "workers", "runs_file", "output_json", "plot", "markdown")
    return {name: value for name, value in asdict(args).items() if name not in free} | {"model": model}


def _key(entry: RouterEntry | RouterResult) -> str:
    return json.dumps([entry.name, entry.fields, entry.source, entry.highlight], sort_keys=True)


def write_json(path: str, args: ComparisonArguments, results: list[RouterResult]) -> None:
    """Writes arguments, versions and results."""
    record = {
        "arguments": asdict(args),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "routers": [asdict(result) for result in results],
    }
    partial_file = Path(path).with_name(f".{Path(path).name}.partial")
    partial_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial_file.rename(path)


def markdown_table(results: list[RouterResult]) -> str:
    """The table for a README."""
    columns = ["router", "config line", "causal", "source", "held-out", "experts", "MaxVio", "H token / marginal"]
    lines = [columns, ["---"] * 4 + ["---:"] * 4]
    for result in results:
        row = [result.name, f"`{result.config_line}`", "yes" if result.causal else "no", result.source]
        row += [f"{result.held_out_loss:.3f}", f"{result.mean_experts:.1f}", f"{result.max_vio:.2f}"]
        row += [f"{result.token_entropy:.2f} / {result.marginal_entropy:.2f}"]
        lines.append([cell.replace("|", "\\|") for cell in row])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def smoothed(values: list[float], window: int = 10) -> np.ndarray:
    """Mean of each value and up to `window - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def plot_curves(path: str, results: list[RouterResult]) -> None:
    """Draws train loss and MaxVio over the steps; if some results are highlighted, the others in grey."""
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
