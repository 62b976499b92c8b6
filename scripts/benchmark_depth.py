#!/usr/bin/env python
"""Compare the time of models whose layers process some tokens (Mixture-of-Depths) with one whose layers process all.

    python scripts/benchmark_depth.py --threads 1 --rounds 7

Every other layer of a random model has a router, whose threshold lets exactly the share of the tokens through. Each
round times all models in turn; printed is the median over the rounds of the ratios to the model without such layers.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError


VOCABULARY = 1024


@dataclass
class DepthArguments:
    """These arguments set the size of the models and of the batch."""

    capacities: list[float] = field(
        default_factory=lambda: [0.5, 0.125],
        metadata={"help": "shares of the tokens that a layer with a router processes"},
    )
    hidden_size: int = field(default=512, metadata={"help": "width of the models"})
    layers: int = field(default=8, metadata={"help": "number of layers, of which every other one has a router"})
    rows: int = field(default=2, metadata={"help": "number of rows of a batch"})
    length: int = field(default=512, metadata={"help": "number of tokens of a row"})
    new_tokens: int = field(default=32, metadata={"help": "number of tokens that are decoded after half a row"})
    rounds: int = field(default=7, metadata={"help": "number of timed rounds"})
    threads: int = field(default=1, metadata={"help": "number of threads of torch"})

    def __post_init__(self):
        for name in ("layers", "length"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 2")
        for name in ("rows", "new_tokens", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")


@torch.no_grad()
def make_model(capacity: float | None, ids: torch.Tensor, args: DepthArguments) -> MoEForCausalLM:
    """Returns a model whose routers let the share `capacity` of the tokens `ids` through; None for a model without routers."""
    torch.manual_seed(0)
    routed: dict[str, Any] = {}
    if capacity is not None:
        routed = {"depth_layers": [index % 2 for index in range(args.layers)], "depth_capacity": capacity}
    size = args.hidden_size
    model = MoEForCausalLM(
        MoEConfig(
            vocab_size=VOCABULARY, hidden_size=size, intermediate_size=2 * size, moe_intermediate_size=size,
            num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=4, num_experts=8,
            num_experts_per_tok=2, max_position_embeddings=args.length + args.new_tokens, **routed,
        )
    ).eval()  # fmt: skip
    if capacity is not None:
        _set_thresholds(model, capacity, ids)
    return model


def _set_thresholds(model: MoEForCausalLM, capacity: float, ids: torch.Tensor) -> None:
    """Lets the share of the tokens through each router; a threshold changes the tokens that the later routers see."""
    routers = [layer.depth.gate for layer in model.model.layers if layer.depth is not None]
    for place, router in enumerate(routers):
        scores = model(ids, output_router_logits=True).depth_router_logits[place].sigmoid().float()
        router.threshold.fill_(torch.quantile(scores, 1 - capacity))


def train(model: MoEForCausalLM, ids: torch.Tensor, args: DepthArguments) -> None:
    """Computes the gradients of a batch."""
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


@torch.no_grad()
def prompt(model: MoEForCausalLM, ids: torch.Tensor, args: DepthArguments) -> None:
    """Computes the logits of a batch."""
    model.eval()(ids, use_cache=False)


def decode(model: MoEForCausalLM, ids: torch.Tensor, args: DepthArguments) -> None:
    """Decodes after half a row."""
    length = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    model.eval().generate(ids[:1, : args.length // 2], do_sample=False, pad_token_id=0, **length)


WORK: dict[str, Callable[[MoEForCausalLM, torch.Tensor, DepthArguments], None]] = {
    "training step": train,
    "prompt": prompt,
    "decoding": decode,
}


def ratios(args: DepthArguments) -> dict[str, dict[float, float]]:
    """Returns for each kind of work the median ratio of each capacity's time to that of the model without routers."""
    ids = torch.randint(3, VOCABULARY, (args.rows, args.length), generator=torch.Generator().manual_seed(1))
    models = {capacity: make_model(capacity, ids, args) for capacity in (None, *args.capacities)}
    found = {}
    for name, work in WORK.items():
        times: dict[float | None, list[float]] = {capacity: [] for capacity in models}
        for number in range(args.rounds + 1):
            for capacity, model in models.items():
                start = time.perf_counter()
                work(model, ids, args)
                if number:  # the first round warms up
                    times[capacity].append(time.perf_counter() - start)
        found[name] = {
            capacity: statistics.median(one / base for one, base in zip(times[capacity], times[None], strict=True))
            for capacity in args.capacities
        }
    return found


def main() -> None:
    """Prints the ratios as a table."""
    (args,) = parse([DepthArguments], __doc__)
    torch.set_num_threads(args.threads)
    table = Table("depth_capacity", *WORK, title="time relative to the model without depth_layers")
    found = ratios(args)
    for capacity in args.capacities:
        table.add_row(f"{capacity:g}", *(f"{found[name][capacity]:.2f}" for name in WORK))
    Console().print(table)


if __name__ == "__main__":
    run(main)
