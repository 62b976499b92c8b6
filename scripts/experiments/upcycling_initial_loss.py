# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment measures how each method of upcycling changes loss and logits of a dense model before training.

# D domains, S tokens of each, V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import datasets
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_moe.checkpoints import LazyTensor, State
from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.data import DataArguments, cut_documents, hold_out
from modeling_moe.resizing.growth import GrowthOptions, grow
from modeling_moe.upcycling.assembly import assemble
from modeling_moe.upcycling.calibration import measure
from modeling_moe.upcycling.options import UpcyclingOptions
from modeling_moe.upcycling.plan import make_plan
from modeling_moe.upcycling.request import LayerRequest
from modeling_moe.upcycling.router_init import router_weight
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_model, load_tokenizer

from .files import refuse_missing_folders
from .python_text import python_documents
from .scoring import cross_entropy


# largest difference of the fp32 logits of a method that claims to compute the dense function
TOLERANCE = 1e-3
# share of the text that is held out
HELD_OUT_PART = 0.1


@dataclass
class TableArguments:
    """These arguments name the model, the text and the methods."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a dense model"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "two texts, each as domain=file; without it, Python's own documentation and sources. A tenth of a text "
            "is evaluated; routers and neuron groups are measured on the rest"
        },
    )
    tokens: int = field(default=256, metadata={"help": "number of held-out tokens evaluated in each domain"})
    calibration_tokens: int = field(
        default=1024, metadata={"help": "number of tokens of each domain that routers are measured on"}
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "names of the methods to measure; all methods without it"}
    )
    output_json: str | None = field(default=None, metadata={"help": "file for the results"})
    seed: int = field(default=0, metadata={"help": "seed of all random numbers"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code from the checkpoint"})

    def __post_init__(self):
        if self.tokens < 2:
            raise UserError(f"tokens is {self.tokens}: it must be at least 2 to compute a loss")
        refuse_missing_folders(self, "output_json")


@dataclass(frozen=True)
class Method:
    """Describes a method, a row of the table.

    Attributes:
        name: name in the table.
        source: paper or tool that published the method.
        options: values of [`UpcyclingOptions`] that differ from the defaults.
        growth: values of [`GrowthOptions`] with which the upcycled model grows; None if it does not grow.
        own_rows: whether each shard has its own row in the router, see [`with_own_rows`].
    """

    name: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    growth: dict[str, Any] | None = None
    own_rows: bool = False

    @property
    def options_line(self) -> str:
        """The options as one line of text."""
        parts = self.options | {f"growth.{name}": value for name, value in (self.growth or {}).items()}
        return ", ".join(f"{name}={value}" for name, value in parts.items())


_VG = {"num_experts": 64, "granularity": 8, "num_experts_per_tok": 8}
_PRE_SOFTMAX = {"norm_topk_prob": False}
_GROWN = {"num_experts": 4, "num_experts_per_tok": 2}
_ATTENTION = {"attention_experts": 8, "attention_experts_per_tok": 2}
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
    Method("virtual groups, broken", "not a multiple of the shards", _VG | {"num_experts_per_tok": 12}),
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
    Method("attention experts", "ours (MoA)", _ATTENTION | {"layers": "none"}),
    Method("attention experts, N(0, 1) router", "ours (MoA)", _ATTENTION | {"layers": "none", "router_std": 1.0}),
    Method("attention experts and copies", "ours (MoA)", _ATTENTION),
    Method("attention experts and virtual groups", "ours (MoA)", _ATTENTION | _VG),
    Method("attention experts, 5% noise", "ours (MoA)", _ATTENTION | {"layers": "none", "noise": 0.05}),
    Method("attention experts, text router", "ours (MoA)", _ATTENTION | {"layers": "none", "router_init": "text"}),
    Method("every second layer", "Sparse Upcycling, renormalised", {"layers": "every:2"}),
    Method("text router", "mergekit's hidden gates, of the MoE's input", {"router_init": "text"}),
    Method("k-means router", "ours", {"router_init": "kmeans"}),
    Method("ridge router", "DUME", {"router_init": "ridge"}),
    Method("grown, clones", "Orthogonal Growth", _GROWN, {"mode": "clone", "factor": 2}),
    Method("grown, masked", "ours", _GROWN, {"mode": "masked", "factor": 2}),
)


@dataclass(frozen=True)
class InitialLoss:
    """Holds the result of a method before training.

    Attributes:
        name, source, options: the fields of [`Method`], with the options as one line of text.
        reason_not_exact: why the method does not claim to compute the dense function; None if it claims to.
        delta_loss: loss minus the dense model's loss, in nats per token.
        largest_difference: largest difference between two logits of the two models.
    """

    name: str
    source: str
    options: str
    reason_not_exact: str | None
    delta_loss: float
    largest_difference: float


@dataclass(frozen=True)
class InitialLossTable:
    """Holds the results of all methods, and the loss of the dense model in nats per token."""

    dense_loss: float
    results: list[InitialLoss]


def with_own_rows(state: State, config: MoEConfig, options: UpcyclingOptions) -> State:
    """Returns the checkpoint with a random router row for each shard.

    A token may then choose shards of several replicas.
    """
    untied = replace(options, granularity=1)
    sparse = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    return state | {
        f"model.layers.{i}.mlp.gate.weight": router_weight(LayerRequest([], i, config, untied, {})) for i in sparse
    }


@torch.no_grad()
def compare_logits(model: torch.nn.Module, ids: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Compares the logits of a model on ids (D, S) with `expected` (D, S, V).

    Returns:
        The model's loss minus the loss of `expected`, in nats per token, and the largest difference of two logits.
    """
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return cross_entropy(logits, ids) - cross_entropy(expected, ids), (logits - expected).abs().max().item()


def held_out_ids(
    tokenizer: PreTrainedTokenizerBase, domains: dict[str, datasets.Dataset], tokens: int
) -> torch.Tensor:
    """Returns the first token ids (D, S) int64 of each domain's held-out text.

    Raises:
        UserError: if a domain has fewer tokens.
    """
    rows = []
    for name, pieces in domains.items():
        ids = tokenizer("".join(pieces["text"]), add_special_tokens=False, verbose=False).input_ids[:tokens]
        if len(ids) < tokens:
            raise UserError(f"tokens is {tokens}, but domain {name!r} has {len(ids)} held-out tokens: lower it")
        rows.append(ids)
    return torch.tensor(rows)


def chosen_methods(only: Sequence[str] | None) -> list[Method]:
    """Returns the methods with the names `only`, or all methods if it is None.

    Raises:
        UserError: if a name is unknown.
    """
    for name in only or []:
        if all(method.name != name for method in METHODS):
            raise UserError(
                f"only {name!r} is unknown: it must be one of {'; '.join(method.name for method in METHODS)}"
            )
    return [method for method in METHODS if only is None or method.name in only]


def initial_loss_table(args: TableArguments) -> InitialLossTable:
    """Upcycles a dense model by each method, one at a time, and runs the results on one text in fp32.

    The dense model is transformers' own implementation, so that errors of the import are visible too.

    Raises:
        UserError: if an argument or the source cannot be used.
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
    # weights are read once, not once for each method
    state = {name: LazyTensor.of(tensor.read()) for name, tensor in checkpoint.state.items()}
    dense = load_state(checkpoint.config, state)
    domains = {name: training for name, (training, _) in parts.items()}

    def measured(config: MoEConfig, options: UpcyclingOptions) -> dict[str, torch.Tensor]:
        return measure(dense, tokenizer, domains, config, options)

    fixed: dict[str, Any] = {
        "calibration_data": list(texts),
        "calibration_tokens": args.calibration_tokens,
        "seed": args.seed,
    }
    results = []
    for method in tqdm(methods, desc="methods"):
        options = UpcyclingOptions(**(fixed | method.options))
        made = make(method, options, checkpoint.source_config, state, measured)
        delta, difference = compare_logits(load_state(made.config, made.state), ids, expected)
        row = (method.name, method.source, method.options_line, made.reason_not_exact)
        results.append(InitialLoss(*row, delta, difference))
    return InitialLossTable(cross_entropy(expected, ids), results)


class MadeModel(NamedTuple):
    """Holds an upcycled model, and why it does not claim to compute the dense function (None if it claims to)."""

    config: MoEConfig
    state: State
    reason_not_exact: str | None


def make(
    method: Method,
    options: UpcyclingOptions,
    source_config: PreTrainedConfig,
    state: State,
    measured: Callable[[MoEConfig, UpcyclingOptions], dict[str, torch.Tensor]],
) -> MadeModel:
    """Applies a method to a dense fp32 checkpoint.

    Args:
        method: the method.
        options: all options of the method.
        source_config: configuration of the dense model.
        state: checkpoint of the dense model.
        measured: function from a result's configuration and options to the tensors measured on text.

    Raises:
        UserError: if the method cannot be applied to this source.
    """
    plan = make_plan(source_config, options, torch.float32)
    config, reason_not_exact = plan.config, plan.reason_not_exact
    made = assemble([state], config, options, measured(config, options))
    if method.own_rows:
        made = with_own_rows(made, config, options)
        reason_not_exact = "every shard has its own row in the router: a token is sent to parts of different networks"
    if method.growth is not None:
        growth = GrowthOptions(**method.growth)
        made, config = grow(made, config, growth)
        reason_not_exact = "; ".join(filter(None, (reason_not_exact, growth.reason_not_exact()))) or None
    return MadeModel(config, made, reason_not_exact)


def refuse_broken_claims(results: Sequence[InitialLoss]) -> None:
    """Raises UserError if a method claims to compute the dense function and does not."""
    broken = [
        f"{result.name} ({result.largest_difference:.1e})"
        for result in results
        if not result.reason_not_exact and not result.largest_difference <= TOLERANCE
    ]
    if broken:
        raise UserError(
            f"methods claim to compute the dense function, but their logits differ by more than {TOLERANCE:g}: "
            f"{', '.join(broken)}: please report the source's config.json"
        )
