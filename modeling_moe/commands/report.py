# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command shows how evenly each layer of any MoE uses its experts on texts, by domain.

    moe report --model_name_or_path ./moe --data wiki=wiki.txt code=code.jsonl
    moe report --model_name_or_path allenai/OLMoE-1B-7B-0924 --data wiki=wiki.txt --max_tokens 65536 --output_json load.json
    moe report --model_name_or_path ./moe --data wiki=wiki.txt --output_markdown load.md --plot load.png

Tokens are counted where transformers calls the experts, after any drop by capacity, so checkpoints of this package and of
transformers' own MoE classes work alike. Balance is the busiest expert's tokens over the mean (1 is balanced); the entropy of
the shares is in nats (ln E is balanced), and exp(entropy) is the number of experts in effective use; a dead expert gets no
token. --plot needs matplotlib: pip install "modeling-moe[plot]".
"""

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from ..data import DataArguments
from ..evaluation import EvaluationArguments, load_for_scoring, score
from ..monitoring import ExpertLoadRecorder, experts_modules, max_violation
from ..utils.atomic import write_text
from ..utils.command_line import parse, refuse_missing_folder
from ..utils.errors import UserError
from ..utils.json_files import write_json


COLUMNS = ("layer", "balance", "entropy", "experts in use", "dead experts", "busiest expert")


@dataclass
class ReportArguments(EvaluationArguments):
    """Which model to look at, and what to write."""

    output_markdown: str | None = field(default=None, metadata={"help": "Markdown file for the tables"})
    plot: str | None = field(default=None, metadata={"help": "picture of the load of each expert in each layer"})

    def __post_init__(self):
        super().__post_init__()
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("plot needs matplotlib: pip install 'modeling-moe[plot]'")


@dataclass(frozen=True)
class LayerLoad:
    """The load of the experts of one layer.

    Attributes:
        layer: index of the layer in the model.
        tokens: number of assignments of each of the E experts.
        balance: the largest of `tokens` over their mean; 1 is balanced, E is one expert for all.
        entropy: entropy of the shares of `tokens` in nats; ln E is balanced.
        dead_experts: ids of the experts without a token.
    """

    layer: int
    tokens: list[int]
    balance: float
    entropy: float
    dead_experts: list[int]

    def row(self) -> list[str]:
        """Returns the cells of `COLUMNS`."""
        dead = f"{len(self.dead_experts)} of {len(self.tokens)}"
        busiest = max(range(len(self.tokens)), key=self.tokens.__getitem__)
        return [
            str(self.layer),
            f"{self.balance:.3f}",
            f"{self.entropy:.3f}",
            f"{math.exp(self.entropy):.1f} of {len(self.tokens)}",
            dead,
            str(busiest),
        ]


def layer_load(layer: int, load: torch.Tensor) -> LayerLoad:
    """Describes the load (E,) of the experts of a layer."""
    load = load.double()
    share = load / load.sum().clamp(min=1)
    return LayerLoad(
        layer=layer,
        tokens=[int(count) for count in load.tolist()],
        balance=1 + max_violation(load).item(),
        entropy=torch.special.entr(share).sum().item(),
        dead_experts=(load == 0).nonzero().flatten().tolist(),
    )


def _sparse_layers(model: PreTrainedModel) -> list[int]:
    """Returns the index of the layer that each experts module belongs to, in the order of the model."""
    names = {module: name for name, module in model.named_modules()}
    found = [re.search(r"\.(\d+)\.", names[module]) for module in experts_modules(model)]
    return [int(number[1]) if number else place for place, number in enumerate(found)]


def measure_load(model: PreTrainedModel, blocks: datasets.Dataset, batch_size: int, desc: str) -> list[LayerLoad]:
    """Runs a model on blocks of tokens and counts the tokens of each expert.

    Args:
        model: any MoE causal LM, on the device to run on.
        blocks: see [`~modeling_moe.evaluation.score`].
        batch_size: blocks of one forward pass.
        desc: text of the progress bar.

    Raises:
        UserError: if the model is dense, or does not call its experts by transformers' interface.
    """
    layers = _sparse_layers(model)
    with ExpertLoadRecorder(model) as recorder:
        score(model, blocks, batch_size, desc=desc)
    load = recorder.take()
    if load is None or len(load) != len(layers):
        raise UserError(
            f"{type(model).__name__} has no experts that transformers' interface for experts calls, or layers with different "
            "numbers of experts: report counts tokens there alone"
        )
    return [layer_load(layer, counts) for layer, counts in zip(layers, load, strict=True)]


def report(args: ReportArguments, data_args: DataArguments) -> dict[str, list[LayerLoad]]:
    """Measures the load of each layer on the text of each domain.

    Raises:
        UserError: for an argument that cannot work.
    """
    if PartialState().num_processes > 1:
        raise UserError("report counts the tokens of one process: start it without accelerate launch or torchrun")
    model, domains = load_for_scoring(args, data_args)
    return {name: measure_load(model, blocks, args.batch_size, name) for name, blocks in domains.items()}


def markdown(loads: Mapping[str, Sequence[LayerLoad]]) -> str:
    """Returns one Markdown table for each domain."""
    parts = []
    for domain, layers in loads.items():
        rows = [COLUMNS, ["---:"] * len(COLUMNS), *(layer.row() for layer in layers)]
        parts.append(f"### {domain}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
    return "\n".join(parts)


def plot(loads: Mapping[str, Sequence[LayerLoad]], path: str) -> None:
    """Draws one panel for each domain: the load of each expert (columns) of each layer (rows) over the mean of the layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(loads), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (domain, layers) in zip(figure.subplots(1, len(loads), squeeze=False)[0], loads.items(), strict=True):
        load = torch.tensor([layer.tokens for layer in layers], dtype=torch.float64)
        relative = load / load.mean(dim=-1, keepdim=True).clamp(min=1e-10)
        image = panel.imshow(relative.numpy(), aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
        panel.set(title=domain, xlabel="expert", ylabel="layer")
        panel.set_yticks(range(len(layers)), [str(layer.layer) for layer in layers])
        figure.colorbar(image, ax=panel, label="tokens over the layer's mean", extend="max")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes what is asked for, and prints the tables."""
    args, data_args = parse([ReportArguments, DataArguments], __doc__, argv)
    refuse_missing_folder(output_json=args.output_json, output_markdown=args.output_markdown, plot=args.plot)
    loads = report(args, data_args)
    if args.output_json is not None:
        values = {domain: [asdict(layer) for layer in layers] for domain, layers in loads.items()}
        write_json(Path(args.output_json), values)
    if args.output_markdown is not None:
        write_text(Path(args.output_markdown), markdown(loads))
    if args.plot is not None:
        plot(loads, args.plot)
    for domain, layers in loads.items():
        table = Table(*COLUMNS, title=f"{args.model_name_or_path}, {domain}")
        for layer in layers:
            table.add_row(*layer.row())
        Console().print(table)
