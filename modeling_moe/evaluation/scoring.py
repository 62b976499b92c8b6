# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module scores how well a causal LM predicts text, and how evenly its routers use the experts."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import DataArguments, one_table, packer
from ..monitoring import RoutingFigures, UnreachableRouting, sparse_layers, watch
from ..utils.errors import UserError
from ..utils.loading import DtypeName, load_model, load_tokenizer, parse_dtype, refuse_longer, refuse_misfit
from .hf_metrics import BitsPerByte, RouterBalance


logger = logging.get_logger(__name__)


@dataclass
class EvaluationArguments:
    """The arguments of `evaluate_lm` beside the data: the model, and the size of batches and texts."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM, sparse or dense"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: DtypeName = field(
        default="auto",
        metadata={"help": "dtype of the weights; auto: as in the checkpoint"},
    )
    batch_size: int = field(default=8, metadata={"help": "number of blocks in one forward pass"})
    max_tokens: int | None = field(
        default=None, metadata={"help": "score at most this many tokens of each domain, in whole blocks; default: all"}
    )
    output_json: str | None = field(default=None, metadata={"help": "JSON file to write the results to"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the Python code that the checkpoint contains"}
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        parse_dtype(self.dtype)


@dataclass(frozen=True)
class DomainScore:
    """The scores of a model on the text of one domain.

    The figures about experts are means over the sparse layers, over all tokens of the text. They are None for a dense model,
    for one whose experts do not follow transformers' experts interface, and where the attribute says so.

    Attributes:
        loss: cross entropy in nats per token.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the scored tokens; comparable between tokenizers.
        tokens: number of scored tokens.
        bytes: number of UTF-8 bytes of the scored tokens.
        expert_share: share of the assignments that each of the E experts received; None if layers have different E.
        expert_load: for each sparse layer, the number of tokens that chose each of its experts, before capacity.
        max_vio: largest load divided by the mean load, minus 1 (0 is balanced).
        load_entropy: entropy of the shares of the load in nats (log(E) is balanced).
        dead_experts: share of the experts without a token.
        dropped_share: share of the assignments that the capacity dropped.
        mean_experts: number of experts with weights that a token chose.
        token_entropy: mean entropy of a token's probabilities in nats, low if the router is sure; None if the model does not
            tell the probabilities.
        marginal_entropy: entropy of the mean probabilities in nats (log(E) is balanced, low in collapse); None likewise.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    expert_share: list[float] | None = None
    expert_load: list[list[float]] | None = None
    max_vio: float | None = None
    load_entropy: float | None = None
    dead_experts: float | None = None
    dropped_share: float | None = None
    mean_experts: float | None = None
    token_entropy: float | None = None
    marginal_entropy: float | None = None


def _batches(blocks: datasets.Dataset, batch_size: int) -> list[range]:
    """Returns the rows of each batch. A block that is shorter than the others gets a batch alone, so none is padded."""
    full = sum(len(ids) == len(blocks[0]["input_ids"]) for ids in blocks["input_ids"])
    batches = [range(start, min(start + batch_size, full)) for start in range(0, full, batch_size)]
    return batches + [range(row, row + 1) for row in range(full, len(blocks))]


def _nats(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the summed cross entropy in nats of the labels (B, S) that are not -100; the first token is not predicted."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()


def _has_experts(model: PreTrainedModel) -> bool:
    """Returns whether the routing of a model can be watched."""
    try:
        return bool(sparse_layers(model))
    except UnreachableRouting:
        return False


def _routing_scores(figures: RoutingFigures) -> dict[str, Any]:
    """Returns the attributes of a [`DomainScore`] that tell about experts."""
    balance = RouterBalance(keep_in_memory=True)
    load = [layer.load.tolist() for layer in figures.layers]
    balance.add_batch(load=[load])
    found = balance.compute()
    # evaluate returns None only to the other processes of its own way of sharing
    assert found is not None
    names = ("dropped_share", "mean_experts", "token_entropy", "marginal_entropy")
    means = {name: figures.overall.get(name) for name in names}
    return {"expert_load": load, "max_vio": found.pop("max_violation"), **found, **means}


def _warn_of_unseen_experts(model: PreTrainedModel) -> None:
    """Says why the experts of a sparse model are not shown."""
    try:
        sparse_layers(model)
    except UnreachableRouting as error:
        if not error.dense:
            logger.warning(f"The load of the experts is not shown: {error}")


@torch.no_grad()
def score(model: PreTrainedModel, blocks: datasets.Dataset, batch_size: int = 8, desc: str = "scoring") -> DomainScore:
    """Scores blocks of tokens independently of each other.

    The first token of a block serves as context only. The batch size does not change the scores: no block is padded,
    and a capacity applies to each block. (lm_eval pads the texts of a batch without an attention mask, so a model with
    `eval_capacity_factor` needs `--batch_size 1` there.)

    Several processes share the batches and all receive the whole result, so all must call it.

    Args:
        model: any causal LM, on the device to run on. It stays in evaluation mode.
        blocks: rows from [`~modeling_moe.data.pack`] with `for_scoring`: `input_ids`, `num_bytes` and optionally
            `labels` (-100 for a token that is not scored). All blocks but the last have one length.
        batch_size: number of blocks in one forward pass.
        desc: text of the progress bar.
    """
    model.eval()
    state = PartialState()
    metric = BitsPerByte(keep_in_memory=True)
    batches = _batches(blocks, batch_size)
    mine = batches[state.process_index :: state.num_processes]
    counts = bool(mine)
    with watch(model, co_activation=False) if _has_experts(model) else nullcontext() as routing:
        # a process without a batch runs the first one too, and adds zeros
        for rows in tqdm(mine or batches[:1], desc=desc, disable=not state.is_local_main_process):
            batch = blocks[rows]
            labels = torch.tensor(batch.get("labels", batch["input_ids"]), device=model.device)
            nll_sum = _nats(model, torch.tensor(batch["input_ids"], device=model.device), labels)
            counted = (labels[:, 1:] != -100).cpu()
            size = sum(
                sum(size for size, count in zip(sizes[1:], row.tolist(), strict=True) if count)
                for sizes, row in zip(batch["num_bytes"], counted, strict=True)
            )
            metric.add_batch(nll_sum=[nll_sum * counts], tokens=[counted.sum().item() * counts], bytes=[size * counts])
    scores = metric.compute(gather=True)
    # evaluate returns None only to the other processes of its own way of sharing
    assert scores is not None
    if routing is None:
        return DomainScore(**scores)
    if not counts:
        routing.reset()
    return DomainScore(**scores, **_routing_scores(routing.read()))


def load_for_scoring(
    args: EvaluationArguments, data_args: DataArguments
) -> tuple[PreTrainedModel, dict[str, datasets.Dataset]]:
    """Loads a model to its device, and the blocks of tokens of each domain.

    A model with a LoRA adapter makes this function call [`~modeling_moe.lora.enable`].

    Raises:
        UserError: if an argument cannot work.
    """
    if args.max_tokens is not None and args.max_tokens < data_args.max_length:
        raise UserError(
            f"max_tokens {args.max_tokens} is less than a block of max_length {data_args.max_length}: raise it"
        )
    texts = data_args.load(conversations=True)
    tokenizer = load_tokenizer(args.model_name_or_path, args.gguf_file, trust_remote_code=args.trust_remote_code)
    domains = {}
    for name, documents in texts.items():
        pack_rows = packer(documents, tokenizer, data_args.assistant_only)
        blocks = pack_rows(documents, tokenizer, data_args.max_length, for_scoring=True)
        if len(blocks) == 0:
            raise UserError(
                f"data {name!r} has fewer than the 2 tokens that a score needs, or nothing that the assistant says: give "
                "more text"
            )
        if args.max_tokens is not None:
            blocks = one_table(blocks.select(range(min(len(blocks), args.max_tokens // data_args.max_length))))
        domains[name] = blocks
    model = load_model(args.model_name_or_path, args.gguf_file, args.dtype, trust_remote_code=args.trust_remote_code)
    if getattr(model, "peft_config", None):
        # here, since PEFT takes seconds to import
        from ..lora import enable

        enable()
    refuse_misfit(tokenizer, model)
    for blocks in domains.values():
        refuse_longer(model, len(blocks[0]["input_ids"]), f"max_length is {data_args.max_length}")
    # transformers wraps `to` in a way that hides `self` from the type checker
    return model.to(PartialState().device), domains  # pyrefly: ignore[bad-argument-type]


def evaluate_lm(args: EvaluationArguments, data_args: DataArguments) -> dict[str, DomainScore]:
    """Scores the text of each domain, or its first `max_tokens` tokens, in blocks that do not overlap.

    Of conversations and completions, only the assistant's tokens are scored; `data_args.assistant_only=False` scores
    all. A model with a LoRA adapter makes this function call [`~modeling_moe.lora.enable`].

    Raises:
        UserError: if an argument cannot work.
    """
    model, domains = load_for_scoring(args, data_args)
    scores = {name: score(model, blocks, args.batch_size, desc=name) for name, blocks in domains.items()}
    if all(score.max_vio is None for score in scores.values()):
        _warn_of_unseen_experts(model)
    return scores
