# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command shows the routing of any MoE on texts, layer by layer and domain by domain, as a table and as a page.

    moe report --model_name_or_path ./moe --data wiki=wiki.txt code=code.jsonl --output_dir report
    moe report --model_name_or_path ./moe --data wiki=wiki.txt --output_dir report --history ./moe
    moe report --model_name_or_path ./before --compare ./after --data wiki=wiki.txt code=code.txt --output_dir report
    moe report --model_name_or_path allenai/OLMoE-1B-7B-0924 --data wiki=wiki.txt --max_tokens 65536 --output_json load.json
    moe report --history outputs/moe --output_dir report

The page in --output_dir, report.html, opens without network. Tokens are counted where transformers calls the experts, after any
drop by capacity, so checkpoints of this package and of transformers' own MoE classes work alike. In the table, MaxVio is the
busiest expert's load over the mean load, less 1 (0 is balanced); the entropy of the shares is in nats (ln E is balanced), and
exp(entropy) is the number of experts in effective use; a dead expert gets no token. --history takes the --output_dir of a
training run that logged the routing, as `moe finetune` does. --output_json holds a list of layers for each domain, and with
--compare two of these under `models`, and `changes`.
"""

import math
import os
import unicodedata
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from ..data import DataArguments
from ..evaluation import EvaluationArguments, load_for_scoring
from ..monitoring import sparse_layers
from ..monitoring.report import (
    LayerTrace,
    ModelTrace,
    RoutingReport,
    Traced,
    TraceOptions,
    card_pictures,
    compare_traces,
    read_history,
    refuse_untraceable,
    require_matplotlib,
    trace_routing,
    write_report,
)
from ..utils.command_line import parse, refuse_missing_folder
from ..utils.errors import UserError
from ..utils.folders import whole_folder
from ..utils.json_files import write_json
from ..utils.limits import refuse_vast_fields
from ..utils.loading import load_config, load_tokenizer, one_line_for


COLUMNS = ("layer", "MaxVio", "entropy", "experts in use", "dead experts", "busiest expert")


@dataclass
class ReportArguments(EvaluationArguments):
    """Which model to look at, and what to write."""

    model_name_or_path: str = field(
        default="", metadata={"help": "folder or Hub name of a sparse causal LM; none with --history alone"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "trace at most this many tokens of each domain, in whole blocks; default: all"}
    )
    compare: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a second model, to see what moved on the same texts"}
    )
    history: str | None = field(
        default=None,
        metadata={"help": "trainer_state.json, or folder of a training run, whose logged routing figures are drawn"},
    )
    output_dir: str | None = field(default=None, metadata={"help": "folder for the page and its pictures"})
    overwrite: bool = field(default=False, metadata={"help": "replace the report of an earlier run in output_dir"})
    texts_per_domain: int = field(
        default=3, metadata={"help": "number of texts of each domain to show token by token"}
    )
    text_tokens: int = field(default=256, metadata={"help": "number of tokens to show of a text"})
    top_tokens: int = field(default=10, metadata={"help": "number of tokens to list for each expert of each layer"})
    seed: int = field(
        default=0, metadata={"help": "seed of the test of specialisation, which permutes blocks of text"}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("texts_per_domain", 0), ("text_tokens", 1), ("top_tokens", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not self.model_name_or_path:
            self._check_history_alone()

    def _check_history_alone(self) -> None:
        if self.history is None:
            raise UserError("model_name_or_path is missing: name a model, or draw a training run with --history")
        if self.output_dir is None:
            raise UserError("output_dir is missing: --history is drawn on a page, which needs a folder")
        if self.compare is not None or self.output_json is not None:
            raise UserError("compare and output_json need --model_name_or_path: name the model")

    def trace_options(self) -> TraceOptions:
        """Returns how much of the texts the trace shows."""
        return TraceOptions(
            batch_size=self.batch_size,
            texts=self.texts_per_domain,
            text_tokens=self.text_tokens,
            top_tokens=self.top_tokens,
            seed=self.seed,
            keeps_sets=self.compare is not None,
        )


@dataclass
class ReportDataArguments(DataArguments):
    """The texts on which the routing is traced; none with --history alone."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "domain=source ...; a source is a file of text, source code, .json, .jsonl, .csv, .tsv or .parquet, a "
            "folder or a pattern ('src/**/*.py') of files of one kind, or name[:config] on the Hub"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_unreadable_names(list(self.domains()))


def refuse_unreadable_names(names: Sequence[str]) -> None:
    """Refuses names of domains that a reader of a page or a terminal cannot tell apart.

    Raises:
        UserError: if a name holds a control or formatting character, or two names look alike.
    """
    seen: dict[str, str] = {}
    for name in names:
        for character in name:
            if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
                raise UserError(
                    f"the domain {name!r:.80} holds the control character U+{ord(character):04X}: take a plain name"
                )
        shown = " ".join(unicodedata.normalize("NFKC", name).split())
        if not shown or shown in seen:
            other = f"{seen[shown]!r:.80} look alike" if shown else "no name look alike"
            raise UserError(f"the domains {name!r:.80} and {other}: rename one")
        seen[shown] = name


def shown_names(sources: Sequence[str]) -> list[str]:
    """Returns a name for each model or file that holds no path of this machine, since a report is shared with others.

    A file or folder is called by its own name, after those of as many parent folders as tell it from the others of equal
    name; a name on the Hub stays as it is.
    """
    parts = [Path(os.path.abspath(source)).parts[1:] if os.path.lexists(source) else (source,) for source in sources]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        least = next(
            (count for count in range(1, len(own)) if all(other[-count:] != own[-count:] for other in others)),
            len(own),
        )
        return "/".join(own[-least:])

    return [name(own) for own in parts]


@dataclass(frozen=True)
class LayerLoad:
    """The load of the experts of one layer on one domain.

    Attributes:
        layer: index of the layer in the model.
        tokens: number of assignments of each of the E experts.
        max_violation: the largest of `tokens` over their mean, less 1; 0 is balanced, E - 1 is one expert for all.
        entropy: entropy of the shares of `tokens` in nats; ln E is balanced.
        dead_experts: ids of the experts without a token.
    """

    layer: int
    tokens: list[int]
    max_violation: float
    entropy: float
    dead_experts: list[int]

    def row(self, title: str) -> list[str]:
        """Returns the cells of `COLUMNS`, of which the first is the title of the layer."""
        dead = f"{len(self.dead_experts)} of {len(self.tokens)}"
        busiest = max(range(len(self.tokens)), key=self.tokens.__getitem__)
        return [
            title,
            f"{self.max_violation:.3f}",
            f"{self.entropy:.3f}",
            f"{math.exp(self.entropy):.1f} of {len(self.tokens)}",
            dead,
            str(busiest),
        ]


def layer_load(layer: int, load: np.ndarray) -> LayerLoad:
    """Describes the load (E,) of the experts of a layer."""
    share = load / max(load.sum(), 1)
    used = share[share > 0]
    return LayerLoad(
        layer=layer,
        tokens=load.tolist(),
        max_violation=float(load.max() / load.mean()) - 1 if load.any() else 0.0,
        entropy=float(-(used * np.log(used)).sum()),
        dead_experts=np.flatnonzero(load == 0).tolist(),
    )


def _refuse_unreachable(name: str, trust_remote_code: bool) -> None:
    """Refuses a model without reachable routing before any weight is loaded; remote code is seen only when it is loaded."""
    load_tokenizer(name, trust_remote_code=trust_remote_code)
    config = load_config(name, trust_remote_code=trust_remote_code)
    refuse_vast_fields(config.to_dict(), name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    with one_line_for("the model", name, trust_remote_code), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    refuse_untraceable(sparse_layers(model))


def _trace(args: ReportArguments, data_args: DataArguments, name: str) -> Traced:
    model, domains = load_for_scoring(args, data_args)
    tokenizer = load_tokenizer(args.model_name_or_path, args.gguf_file, trust_remote_code=args.trust_remote_code)
    return trace_routing(model, tokenizer, domains, name, args.trace_options())


def report(args: ReportArguments, data_args: DataArguments) -> RoutingReport:
    """Traces the routing of one or two models on the text of each domain, and reads the history of a training run.

    Raises:
        UserError: for an argument that cannot work.
        UnreachableRouting: if the routing of a model cannot be seen.
    """
    if PartialState().num_processes > 1:
        raise UserError("report counts the tokens of one process: start it without accelerate launch or torchrun")
    history = None if args.history is None else read_history(args.history)
    if not args.model_name_or_path:
        if data_args.data:
            raise UserError("model_name_or_path is missing: the texts of --data need a model")
        return RoutingReport(history=history)
    if not data_args.data:
        raise UserError("data is missing: name texts to trace as domain=source, such as wiki=wiki.txt")
    if args.compare is None:
        (name,) = shown_names([args.model_name_or_path])
        return RoutingReport([_trace(args, data_args, name).trace], history=history)
    _refuse_unreachable(args.compare, args.trust_remote_code)
    names = shown_names([args.model_name_or_path, args.compare])
    first = _trace(args, data_args, names[0])
    second = _trace(replace(args, model_name_or_path=args.compare, gguf_file=None), data_args, names[1])
    return RoutingReport([first.trace, second.trace], compare_traces(first, second), history)


def _layer_json(layer: LayerTrace, domain: int) -> dict[str, Any]:
    # of dead experts the load's figures name the ids in place of the share
    figures = {name: value for name, value in asdict(layer.by_domain[domain]).items() if name != "dead_experts"}
    preference = {
        "specialisation": layer.specialisation[domain].tolist(),
        "significant": layer.significant[domain].tolist(),
    }
    return asdict(layer_load(layer.layer, layer.load[domain])) | {"name": layer.name} | figures | preference


def _model_json(model: ModelTrace) -> dict[str, Any]:
    domains = enumerate(model.domains)
    return {name: [_layer_json(layer, number) for layer in model.layers] for number, name in domains}


def report_json(result: RoutingReport) -> dict[str, Any]:
    """Returns the figures of a report in JSON's types: a list of layers for each domain.

    With two models, two of these under `models`, and beside them `changes`.
    """
    models = [_model_json(model) for model in result.models]
    if result.changes is None:
        return models[0]
    changes = [asdict(change) | {"load_shift": change.load_shift.tolist()} for change in result.changes.layers]
    return {"models": models, "changes": changes, "note": result.changes.note}


def _printable(text: str) -> str:
    return escape("".join(character if character.isprintable() else "\ufffd" for character in text))


def print_tables(result: RoutingReport) -> None:
    """Prints a table for each model and domain, and one of what moved between two models."""
    console = Console()
    for model in result.models:
        for number, domain in enumerate(model.domains):
            table = Table(*COLUMNS, title=_printable(f"{model.name}, {domain}"))
            for layer in model.layers:
                table.add_row(*layer_load(layer.layer, layer.load[number]).row(layer.title))
            console.print(table)
    if result.changes is None:
        return
    domains = [_printable(domain) for domain in result.models[0].domains]
    table = Table(
        "layer", *(f"load moved, {domain}" for domain in domains), "tokens with other experts", title="What moved"
    )
    for change in result.changes.layers:
        changed = "unknown" if change.changed_tokens is None else f"{change.changed_tokens:.1%}"
        table.add_row(change.title, *(f"{shift:.1%}" for shift in change.load_shift), changed)
    if result.changes.layers:
        console.print(table)
    console.print(result.changes.note, highlight=False)


def _recipe(args: ReportArguments, data_args: DataArguments) -> dict[str, Any]:
    """Returns what the report was made of, as `conversion.json` in its folder keeps it, without paths of this machine."""
    models = shown_names([source for source in (args.model_name_or_path, args.compare) if source])
    recipe: dict[str, Any] = dict(zip(("report", "compare"), models, strict=False))
    if args.history is not None:
        recipe["history"] = shown_names([args.history])[0]
    return recipe | {"data": {domain: shown_names([source])[0] for domain, source in data_args.domains().items()}}


def main(argv: Sequence[str] | None = None) -> None:
    """Traces, writes what is asked for, and prints the tables."""
    args, data_args = parse([ReportArguments, ReportDataArguments], __doc__, argv)
    refuse_missing_folder(output_json=args.output_json)
    if args.output_dir is not None:
        require_matplotlib()
    folder = (
        nullcontext()
        if args.output_dir is None
        else whole_folder(args.output_dir, _recipe(args, data_args), args.overwrite)
    )
    with folder as output:
        result = report(args, data_args)
        if output is not None:
            write_report(result, output)
            if result.models:
                card_pictures(result, output)
    if args.output_json is not None:
        write_json(Path(args.output_json), report_json(result))
    print_tables(result)
    if args.output_dir is not None:
        Console().print(f"The report is {Path(args.output_dir) / 'report.html'}", highlight=False, markup=False)
