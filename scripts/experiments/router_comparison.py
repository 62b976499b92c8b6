# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment trains the routers of the catalogue over several seeds; in one seed all have equal batches and weights."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.router_catalogue import router_class
from modeling_moe.utils.errors import UserError

from .byte_models import ByteModelArguments, Corpus, Trained, build, load_corpus, model_config, train
from .files import refuse_missing_folders
from .runs import RunsFile, run_all


ROUTERS_FILE = Path(__file__).resolve().parents[2] / "configuration" / "routers.yaml"
# keys of a router in the YAML file, and the types of their values
ENTRY_KEYS = {"name": str, "fields": dict, "source": str, "highlight": bool}
# routers whose tasks are the domains of the text
BY_TASK = ("task", "mmoe")


@dataclass
class ComparisonArguments(ByteModelArguments):
    """These arguments name the routers, the text and the results, and set the length of the training."""

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
    learning_rate: float = field(default=3e-3, metadata={"help": "learning rate of AdamW"})
    baseline: str | None = field(
        default=None,
        metadata={"help": "name of the router that all others are compared with; without it, the first of the file"},
    )
    output_json: str | None = field(default=None, metadata={"help": "JSON file for the runs, including the curves"})
    plot: str | None = field(default=None, metadata={"help": "PNG file for a plot of the ranking and of MaxVio"})
    markdown: str | None = field(default=None, metadata={"help": "file for the tables in GitHub Markdown"})

    def __post_init__(self):
        super().__post_init__()
        refuse_missing_folders(self, "runs_file", "output_json", "plot", "markdown")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("plot needs matplotlib: pip install 'modeling-moe[science]'")

    def settings(self) -> dict[str, Any]:
        """Returns everything that all runs depend on."""
        return super().settings() | {"learning_rate": self.learning_rate}


@dataclass(frozen=True)
class RouterEntry:
    """Describes one configuration to train.

    Attributes:
        name: name in the table.
        fields: fields of the model's configuration that this router sets.
        source: paper or model that published the router.
        highlight: whether its curves are drawn.
    """

    name: str
    fields: dict[str, Any]
    source: str
    highlight: bool = False

    @property
    def config_line(self) -> str:
        """The fields as arguments of `MoEConfig`, without the default router."""
        fields = {name: value for name, value in self.fields.items() if (name, value) != ("router_type", "topk")}
        return ", ".join(f"{name}={value!r}" for name, value in (fields or self.fields).items())


@dataclass(frozen=True)
class RouterRun:
    """Holds one run: the router's name and fields, the seed, and what was measured."""

    name: str
    fields: dict[str, Any]
    seed: int
    trained: Trained

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "RouterRun":
        """Makes a run from the dictionary that a file of runs stores."""
        return cls(**stored | {"trained": Trained(**stored["trained"])})


@dataclass(frozen=True)
class RouterResult:
    """Holds the runs of one configuration in the order of the seeds.

    Attributes:
        entry: the configuration.
        causal: whether a token's experts are independent of later tokens, in training and in evaluation.
        runs: what was measured with each seed.
    """

    entry: RouterEntry
    causal: bool
    runs: Sequence[Trained]

    def values(self, name: str) -> list[float]:
        """Returns a measured value for each seed."""
        return [getattr(run, name) for run in self.runs]


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
    return model_config(model | entry.fields, f"router {entry.name!r}")


def train_router(
    entry: RouterEntry, seed: int, model_fields: dict[str, Any], corpus: Corpus, args: ComparisonArguments
) -> RouterRun:
    """Trains a new model with one router, and measures it."""
    model = build(router_config(model_fields, entry), model_config(model_fields, "model"), seed)
    return RouterRun(entry.name, entry.fields, seed, train(model, corpus, args, args.learning_rate, seed))


def compare_routers(args: ComparisonArguments) -> list[RouterResult]:
    """Trains every router of `routers_file`, or those of `only`; results are in the order of the file.

    Raises:
        UserError: if an argument or a file cannot be used; nothing is trained then.
    """
    model, entries = load_entries(args.routers_file or str(ROUTERS_FILE))
    names = [entry.name for entry in entries]
    for name in args.only or []:
        if name not in names:
            raise UserError(
                f"only {name!r} is not in {args.routers_file or ROUTERS_FILE}: choose one of {', '.join(names)}"
            )
    if args.baseline is not None and args.baseline not in (args.only or names):
        raise UserError(f"baseline {args.baseline!r} is not trained: choose one of {', '.join(args.only or names)}")
    entries = [entry for entry in entries if args.only is None or entry.name in args.only]
    configs = [router_config(model, entry) for entry in entries]
    file = RunsFile(args.runs_file, args.settings() | {"model": model})
    done: dict[tuple[str, int], RouterRun] = {}
    for run in file.read(RouterRun.of):
        if run.fields == next((entry.fields for entry in entries if entry.name == run.name), None):
            done[run.name, run.seed] = run

    def finish(run: RouterRun) -> None:
        done[run.name, run.seed] = run
        file.add(asdict(run))

    # the seed changes last, so that a stopped comparison has whole seeds
    pairs = [(seed, entry) for seed in args.all_seeds for entry in entries]
    missing = [(seed, entry) for seed, entry in pairs if (entry.name, seed) not in done]
    corpora = {seed: load_corpus(args, seed) for seed in dict.fromkeys(seed for seed, _ in missing)}
    for corpus in corpora.values():
        refuse_too_few_tasks(entries, configs, len(corpus.training))
    jobs = [(entry, seed, model, corpora[seed], args) for seed, entry in missing]
    run_all(jobs, train_router, args.workers, finish, file, "routers")
    for seed in args.all_seeds:
        if len({done[entry.name, seed].trained.text for entry in entries}) > 1:
            raise UserError(
                f"runs_file {args.runs_file} holds runs of seed {seed} on different texts: name another file"
            )
    return [
        RouterResult(
            entry=entry,
            causal=router_class(config).causal and config.capacity_priority == "token",
            runs=[done[entry.name, seed].trained for seed in args.all_seeds],
        )
        for entry, config in zip(entries, configs, strict=True)
    ]


def refuse_too_few_tasks(entries: Sequence[RouterEntry], configs: Sequence[MoEConfig], domains: int) -> None:
    """Raises UserError if a router by task has fewer tasks than the data have domains."""
    for entry, config in zip(entries, configs, strict=True):
        if config.router_type in BY_TASK and config.num_tasks < domains:
            raise UserError(
                f"router {entry.name!r} has num_tasks={config.num_tasks}, but the data have {domains} domains, "
                "each of which is a task: raise it"
            )
