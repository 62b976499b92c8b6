# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment trains a model whose router collapses, with many cures, coefficients, learning rates and seeds."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from modeling_moe.utils.errors import UserError

from .byte_models import ByteModelArguments, Corpus, Trained, build, load_corpus, model_config, train
from .files import refuse_missing_folders
from .runs import RunsFile, run_all


CURES_FILE = Path(__file__).resolve().parents[2] / "configuration" / "collapse.yaml"
# a run is collapsed if this share of the experts, or more, is starved: has less than a tenth of the mean load
COLLAPSED = 0.25
NO_CURE = "none"
# keys of a cure in the YAML file, and the types of their values
CURE_KEYS = {"name": str, "varied": list, "coefficients": list, "source": str, "fields": dict}


@dataclass
class CollapseArguments(ByteModelArguments):
    """These arguments name the cures, the text and the results, and set the length of the training."""

    steps: int = field(default=80, metadata={"help": "number of optimizer steps of a run"})
    batch_size: int = field(default=4, metadata={"help": "number of sequences in a batch"})
    eval_batches: int = field(default=16, metadata={"help": "number of batches of held-out text"})
    seeds: int = field(default=3, metadata={"help": "number of seeds"})
    cures_file: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with the model's fields, the learning rates and the cures; without it, "
            "configuration/collapse.yaml of this repository"
        },
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "names of the cures to train beside the model without cure; all without it"}
    )
    plot: str | None = field(default=None, metadata={"help": "PNG file for the phase picture"})
    markdown: str | None = field(default=None, metadata={"help": "file for the tables in GitHub Markdown"})

    def __post_init__(self):
        super().__post_init__()
        if self.seeds < 2:
            raise UserError(f"seeds is {self.seeds}: it must be at least 2 to compute an interval")
        refuse_missing_folders(self, "runs_file", "plot", "markdown")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("plot needs matplotlib: pip install 'modeling-moe[science]'")


@dataclass(frozen=True)
class Cure:
    """Describes what may prevent collapse.

    Attributes:
        name: name in the table.
        varied: fields of the configuration that get the coefficient.
        coefficients: values to try.
        source: paper or model that published the cure.
        fields: further fields of the configuration.
    """

    name: str
    varied: list[str]
    coefficients: list[float]
    source: str
    fields: dict[str, Any] = field(default_factory=dict)

    def at(self, coefficient: float) -> dict[str, Any]:
        """Returns the fields of the configuration with one coefficient."""
        return self.fields | dict.fromkeys(self.varied, coefficient)


class Cell(NamedTuple):
    """Names a cure with a coefficient, at a learning rate; without cure the coefficient is 0."""

    cure: str
    coefficient: float
    learning_rate: float


@dataclass(frozen=True)
class CollapseRun:
    """Holds one run: the cell, the cure's fields, the seed, and what was measured."""

    cure: str
    coefficient: float
    learning_rate: float
    fields: dict[str, Any]
    seed: int
    trained: Trained

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "CollapseRun":
        """Makes a run from the dictionary that a file of runs stores."""
        return cls(**stored | {"trained": Trained(**stored["trained"])})

    @property
    def cell(self) -> Cell:
        """The cell of the run."""
        return Cell(self.cure, self.coefficient, self.learning_rate)


@dataclass(frozen=True)
class CollapseResult:
    """Holds all runs: the cures and the learning rates in the order of the file, and the runs by cell and seed."""

    cures: Sequence[Cure]
    learning_rates: Sequence[float]
    runs: dict[Cell, list[Trained]]


def load_cures(path: str) -> tuple[dict[str, Any], list[float], list[Cure]]:
    """Reads the model's fields, the learning rates and the cures from a YAML file.

    Raises:
        UserError: if the file does not exist or is malformed.
    """
    if not Path(path).is_file():
        raise UserError(f"cures_file {path} does not exist: correct the path")
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"cures_file {path} is not YAML: {error}") from error
    kinds = {"model": dict, "learning_rates": list, "cures": list}
    if not isinstance(content, dict) or {key: type(value) for key, value in content.items()} != kinds:
        raise UserError(f"cures_file {path} must contain 'model', 'learning_rates' and 'cures', and nothing else")
    _refuse_other_than_numbers(content["learning_rates"], f"cures_file {path}: 'learning_rates'")
    cures = [_cure(cure, f"cures_file {path}, cure {number}") for number, cure in enumerate(content["cures"], start=1)]
    if len({cure.name for cure in cures} | {NO_CURE}) <= len(cures):
        raise UserError(f"cures_file {path}: give each cure a different name, and none the name {NO_CURE!r}")
    return content["model"], content["learning_rates"], cures


def _cure(cure: Any, where: str) -> Cure:
    if not isinstance(cure, dict) or not set(CURE_KEYS) - {"fields"} <= set(cure):
        raise UserError(f"{where}: it must have 'name', 'varied', 'coefficients' and 'source'")
    for key, value in cure.items():
        if key not in CURE_KEYS:
            raise UserError(f"{where}: {key!r} is unknown: choose one of {', '.join(CURE_KEYS)}")
        if not isinstance(value, CURE_KEYS[key]):
            raise UserError(f"{where}: {key!r} must be a {CURE_KEYS[key].__name__}")
    _refuse_other_than_numbers(cure["coefficients"], f"{where}: 'coefficients'")
    return Cure(**cure)


def _refuse_other_than_numbers(values: list[Any], where: str) -> None:
    if not values or not all(type(value) in (int, float) for value in values):
        raise UserError(f"{where} must be a list of numbers (write 0.001, not 1e-3)")


def train_cell(
    cell: Cell, fields: dict[str, Any], seed: int, model: dict[str, Any], corpus: Corpus, args: CollapseArguments
) -> CollapseRun:
    """Trains a new model in one cell, and measures it."""
    new = build(model_config(model | fields, f"cure {cell.cure!r}"), model_config(model, "model"), seed)
    return CollapseRun(*cell, fields, seed, train(new, corpus, args, cell.learning_rate, seed))


def collapse_experiment(args: CollapseArguments) -> CollapseResult:
    """Trains the model without cure, and with each cure of `cures_file` or of `only`.

    Raises:
        UserError: if an argument or a file cannot be used; nothing is trained then.
    """
    path = args.cures_file or str(CURES_FILE)
    model, rates, cures = load_cures(path)
    names = [cure.name for cure in cures]
    for name in args.only or []:
        if name not in names:
            raise UserError(f"only {name!r} is not in {path}: choose one of {', '.join(names)}")
    cures = [cure for cure in cures if args.only is None or cure.name in args.only]
    fields = {Cell(NO_CURE, 0.0, rate): {} for rate in rates}
    for cure in cures:
        for coefficient, rate in product(cure.coefficients, rates):
            fields[Cell(cure.name, coefficient, rate)] = cure.at(coefficient)
    for cell, own in fields.items():
        model_config(model | own, f"cure {cell.cure!r}")
    runs = _all_runs(fields, model, args)
    return CollapseResult(cures, rates, {cell: [runs[cell, seed] for seed in args.all_seeds] for cell in fields})


def _all_runs(
    fields: dict[Cell, dict[str, Any]], model: dict[str, Any], args: CollapseArguments
) -> dict[tuple[Cell, int], Trained]:
    file = RunsFile(args.runs_file, args.settings() | {"model": model})
    done: dict[tuple[Cell, int], Trained] = {}
    for run in file.read(CollapseRun.of):
        if fields.get(run.cell) == run.fields:
            done[run.cell, run.seed] = run.trained

    def finish(run: CollapseRun) -> None:
        done[run.cell, run.seed] = run.trained
        file.add(asdict(run))

    # the seed changes last, so that a stopped experiment has whole seeds
    missing = [(cell, seed) for seed in args.all_seeds for cell in fields if (cell, seed) not in done]
    corpora = {seed: load_corpus(args, seed) for seed in dict.fromkeys(seed for _, seed in missing)}
    jobs = [(cell, fields[cell], seed, model, corpora[seed], args) for cell, seed in missing]
    run_all(jobs, train_cell, args.workers, finish, file, "cures")
    for seed in args.all_seeds:
        if len({done[cell, seed].text for cell in fields}) > 1:
            raise UserError(
                f"runs_file {args.runs_file} holds runs of seed {seed} on different texts: name another file"
            )
    return done
