# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What each way to upcycle does to a dense model before any training: loss and logits on the same held-out text.

# D domains, S tokens of each, V vocabulary
"""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from modeling_moe.checkpoints import LazyTensor, State
from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.data.documents import DataArguments, cut_documents, hold_out
from modeling_moe.resizing.growth import GrowthOptions, grow
from modeling_moe.upcycling.assembly import upcycle
from modeling_moe.upcycling.calibration import measure
from modeling_moe.upcycling.options import UpcyclingOptions
from modeling_moe.upcycling.plan import make_plan
from modeling_moe.upcycling.router_init import router_weight
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_model, load_tokenizer

from .router_comparison import cross_entropy, python_documents


# difference of fp32 logits above which a method that claims exactness has broken its word
TOLERANCE = 1e-3
HELD_OUT_PART = 0.1


@dataclass
class TableArguments:
    """Which model, and which text."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a dense model"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "domain=file ..., 2 of them; if not given, Python's own documentation and sources. A tenth is "
            "evaluated, routers and neuron groups are measured on the rest"
        },
    )
    tokens: int = field(default=256, metadata={"help": "tokens of each domain's held-out text"})
    calibration_tokens: int = field(
        default=1024, metadata={"help": "tokens of each domain that routers are measured on"}
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "names of the methods to measure; all if not given"}
    )
    output_json: str | None = field(default=None, metadata={"help": "file for the results"})
    seed: int = field(default=0, metadata={"help": "seed of all that is drawn"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if self.tokens < 2:
            raise UserError(f"tokens is {self.tokens}: a loss needs at least 2")
        refuse_missing_folders(self, "output_json")


def refuse_missing_folders(args: Any, *names: str) -> None:
    """Raises UserError, before anything is computed, where the folder of a file to write does not exist."""
    for name in names:
        path = getattr(args, name)
        if path is not None and not Path(path).parent.is_dir():
            raise UserError(f"{name} {path}: make the folder {Path(path).parent} first")


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: how the table calls it.
        source: paper or tool whose formula it is.
        options: what it changes in [`UpcyclingOptions`].
        growth: what is changed in [`GrowthOptions`] to grow the result; None leaves it as it is.
        own_rows: each shard has its own row in the router, see [`with_own_rows`].
    """

    name: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    growth: dict[str, Any] | None = None
    own_rows: bool = False

    @property
    def options_line(self) -> str:
        """What it changes, as arguments."""
        parts = self.options | {f"growth.{name}": value for name, value in (self.growth or {}).items()}
        return ", ".join(f"{name}={value}" for name, value in parts.items())


_VG = {"num_experts": 64, "granularity": 8, "num_experts_per_tok": 8}
_PRE_SOFTMAX = {"norm_topk_prob": False}
_GROWN = {"num_experts": 4, "num_experts_per_tok": 2}
_SPLIT = {"method": "split", "num_experts": 8}

METHODS = (
    Method("copy", "Sparse Upcycling, renormalised"),
    Method("copy, N(0, 1) router", "mergekit's random gates", {"router_std": 1.0}),
    Method("copy, pre-softmax, unscaled", "Sparse Upcycling", _PRE_SOFTMAX | {"scaling": "none"}),
    Method("copy, pre-softmax, Megatron", "He et al.", _PRE_SOFTMAX | {"scaling": "megatron"}),
    Method("copy, pre-softmax, std .02", "ours", _PRE_SOFTMAX | {"router_std": 0.02}),
    Method("copy, pre-softmax, std .002", "ours", _PRE_SOFTMAX | {"router_std": 0.002}),
    Method("copy, pre-softmax, zero router", "ours", _PRE_SOFTMAX | {"router_init": "zero"}),
    Method("virtual groups", "ours", _VG),
    Method("virtual groups, two per token", "ours", _VG | {"num_experts_per_tok": 16}),
    Method("virtual groups, Megatron", "He et al.", _VG | {"scaling": "megatron"}),
    Method("virtual groups, unscaled", "He et al. without scaling", _VG | {"scaling": "none"}),
    Method("virtual groups, pre-softmax, Megatron", "He et al.", _VG | _PRE_SOFTMAX | {"scaling": "megatron"}),
    Method("virtual groups, pre-softmax, std .02", "ours", _VG | _PRE_SOFTMAX | {"router_std": 0.02}),
    Method("virtual groups, pre-softmax, std .002", "ours", _VG | _PRE_SOFTMAX | {"router_std": 0.002}),
    Method("virtual groups, broken", "no multiple of the shards", _VG | {"num_experts_per_tok": 12}),
    Method("fine-grained, no virtual groups", "a router row for each shard", _VG, own_rows=True),
    Method("shared expert", "ours", {"shared_expert": True}),
    Method("copy, 5% noise", "relative noise", {"noise": 0.05}),
    Method("copy, noise of .01", "absolute noise", {"noise_std": 0.01}),
    Method("drop .5", "Drop-Upcycling", {"method": "drop", "drop_ratio": 0.5}),
    Method("drop .1", "Drop-Upcycling", {"method": "drop", "drop_ratio": 0.1}),
    Method("split, 4 of 8", "LLaMA-MoE", _SPLIT | {"num_experts_per_tok": 4}),
    Method("split, 6 of 8", "LLaMA-MoE", _SPLIT | {"num_experts_per_tok": 6}),
    Method("split, all, zero router", "LLaMA-MoE", _SPLIT | {"num_experts_per_tok": 8, "router_init": "zero"}),
    Method("clustered split, 4 of 8", "LLaMA-MoE", _SPLIT | {"num_experts_per_tok": 4, "split": "clustered"}),
    Method("clustered split, 6 of 8", "LLaMA-MoE", _SPLIT | {"num_experts_per_tok": 6, "split": "clustered"}),
    Method("every second layer", "Sparse Upcycling, renormalised", {"layers": "every:2"}),
    Method("text router", "mergekit's hidden gates, of the MoE's input", {"router_init": "text"}),
    Method("k-means router", "ours", {"router_init": "kmeans"}),
    Method("ridge router", "DUME", {"router_init": "ridge"}),
    Method("grown, clones", "Orthogonal Growth", _GROWN, {"mode": "clone", "factor": 2}),
    Method("grown, masked", "ours", _GROWN, {"mode": "masked", "factor": 2}),
)


@dataclass(frozen=True)
class StepZeroResult:
    """What a method does at step 0.

    Attributes:
        name, source, options: of [`Method`], the options as a line.
        inexactness: why it does not claim to compute the dense function; empty if it claims to.
        delta_loss: nats per token more than the dense model's.
        largest_difference: between any two logits of the two models.
    """

    name: str
    source: str
    options: str
    inexactness: str
    delta_loss: float
    largest_difference: float


@dataclass(frozen=True)
class StepZeroTable:
    """All rows, and the loss (nats per token) of the dense model that they are measured against."""

    dense_loss: float
    results: list[StepZeroResult]


def with_own_rows(state: State, config: MoEConfig, options: UpcyclingOptions) -> State:
    """The checkpoint with a router in which each shard has its own random row, so that replicas fall apart."""
    untied = replace(options, granularity=1)
    sparse = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    return state | {f"model.layers.{i}.mlp.gate.weight": router_weight(i, config, untied, {}) for i in sparse}


@torch.no_grad()
def compare_logits(model: torch.nn.Module, ids: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Loss of a model on ids (D, S) less that of the logits `expected` (D, S, V), and the largest difference of both."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return cross_entropy(logits, ids) - cross_entropy(expected, ids), (logits - expected).abs().max().item()


def held_out_ids(tokenizer: Any, domains: dict[str, datasets.Dataset], tokens: int) -> torch.Tensor:
    """The first tokens of each domain's pieces of text, (D, S) int64.

    Raises:
        UserError: if a domain has fewer.
    """
    rows = []
    for name, pieces in domains.items():
        ids = tokenizer("".join(pieces["text"]), add_special_tokens=False, verbose=False).input_ids[:tokens]
        if len(ids) < tokens:
            raise UserError(f"tokens is {tokens}, but {len(ids)} of domain {name!r} are held out: lower it")
        rows.append(ids)
    return torch.tensor(rows)


def chosen_methods(only: Sequence[str] | None) -> list[Method]:
    """The methods of these names, all if none are given.

    Raises:
        UserError: for a name that there is not.
    """
    for name in only or []:
        if all(method.name != name for method in METHODS):
            raise UserError(f"only {name!r} is no method: choose of {'; '.join(method.name for method in METHODS)}")
    return [method for method in METHODS if only is None or method.name in only]


def step_zero_table(args: TableArguments) -> StepZeroTable:
    """Upcycles a dense model by each method, one at a time, and runs all on the same text in fp32.

    The dense model is transformers' own, so that the import counts too.

    Raises:
        UserError: for an argument or a source that cannot work.
    """
    methods = chosen_methods(args.only)
    texts = python_documents() if args.data is None else DataArguments(data=args.data).load()
    parts = {name: hold_out(cut_documents(text), HELD_OUT_PART, args.seed) for name, text in texts.items()}
    trust = {"trust_remote_code": args.trust_remote_code}
    checkpoint = open_checkpoint(args.model_name_or_path, args.gguf_file, "float32", **trust)
    tokenizer = load_tokenizer(str(checkpoint.source.folder), checkpoint.source.gguf_file, **trust)
    ids = held_out_ids(tokenizer, {name: held_out for name, (_, held_out) in parts.items()}, args.tokens)
    with torch.no_grad():
        model = load_model(args.model_name_or_path, args.gguf_file, "float32", **trust).eval()
        expected = model(ids).logits.float()
    # read once, and not once for each copy
    state = {name: LazyTensor.of(tensor.read()) for name, tensor in checkpoint.state.items()}
    dense = load_state(checkpoint.config, state)
    domains = {name: training for name, (training, _) in parts.items()}

    def measured(config: MoEConfig, options: UpcyclingOptions) -> dict[str, torch.Tensor]:
        return measure(dense, tokenizer, domains, config, options)

    fixed = {"calibration_data": list(texts), "calibration_tokens": args.calibration_tokens, "seed": args.seed}
    results = []
    for method in tqdm(methods, desc="methods"):
        options = UpcyclingOptions(**(fixed | method.options))
        config, made, inexactness = make(method, options, checkpoint.source_config, state, measured)
        delta, difference = compare_logits(load_state(config, made), ids, expected)
        results.append(StepZeroResult(method.name, method.source, method.options_line, inexactness, delta, difference))
    return StepZeroTable(cross_entropy(expected, ids), results)


def make(
    method: Method,
    options: UpcyclingOptions,
    source_config: Any,
    state: State,
    measured: Callable[[MoEConfig, UpcyclingOptions], dict[str, torch.Tensor]],
) -> tuple[MoEConfig, State, str]:
    """What a method makes of a dense fp32 checkpoint.

    Args:
        method: what to make.
        options: of it, complete.
        source_config: the dense model's configuration.
        state: its checkpoint.
        measured: what the text gives for a result's configuration and options.

    Returns:
        Configuration, checkpoint, and why it does not claim to compute the dense function; empty if it claims to.

    Raises:
        UserError: if it makes no model of this source.
    """
    plan = make_plan(source_config, options, torch.float32)
    config, inexactness = plan.config, plan.inexactness
    made = upcycle([state], config, options, measured(config, options))
    if method.own_rows:
        made = with_own_rows(made, config, options)
        inexactness = "every shard has its own row in the router: a token meets parts of different networks"
    if method.growth is not None:
        growth = GrowthOptions(**method.growth)
        made, config = grow(made, config, growth)
        inexactness = "; ".join(reason for reason in (inexactness, growth.inexactness()) if reason)
    return config, made, inexactness


def refuse_broken_claims(results: Sequence[StepZeroResult]) -> None:
    """Raises UserError if a method claims to compute the dense function and does not."""
    broken = [
        f"{result.name} ({result.largest_difference:.1e})"
        for result in results
        if not result.inexactness and not result.largest_difference <= TOLERANCE
    ]
    if broken:
        raise UserError(
            f"these claim to compute the dense function, but their logits differ by more than {TOLERANCE:g}: "
            f"{', '.join(broken)}: please report the source's config.json"
        )


def write_json(path: str, args: Any, content: dict[str, Any]) -> None:
    """Writes arguments, versions and content, whole or not at all."""
    record = {"arguments": asdict(args), "python": platform.python_version(), "torch": torch.__version__} | content
    partial_file = Path(path).with_name(f".{Path(path).name}.partial")
    partial_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial_file.rename(path)
