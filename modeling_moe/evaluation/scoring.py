# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How well a causal LM predicts a text, and how evenly its routers spread it over the experts."""

from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.documents import DataArguments, packer
from ..utils.errors import UserError
from ..utils.loading import load_model, load_tokenizer, parse_dtype, refuse_longer, refuse_misfit
from .expert_load import ExpertLoadRecorder
from .hf_metrics import BitsPerByte, RouterBalance


logger = logging.get_logger(__name__)


@dataclass
class EvaluationArguments:
    """Which model to evaluate and how."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM, sparse or dense"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16"})
    batch_size: int = field(default=8, metadata={"help": "blocks of one forward pass"})
    max_tokens: int | None = field(default=None, metadata={"help": "read no more tokens of a domain; whole blocks"})
    output_json: str | None = field(default=None, metadata={"help": "file for the results"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        parse_dtype(self.dtype)


@dataclass(frozen=True)
class DomainScore:
    """What a model makes of one domain's text.

    Attributes:
        loss: nats per token.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the tokens scored; comparable between tokenizers.
        tokens: number of tokens scored.
        bytes: UTF-8 bytes they stand for.
        expert_share: share of the assignments that each of E experts got, the mean over sparse layers; None without.
        max_vio: largest load over mean load, less 1, the mean over sparse layers (0 is balanced); None without.
        load_entropy: nats of the load's shares, the mean over sparse layers (log(E) is balanced); None without.
        dead_experts: share of the experts that got no token; None without.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    expert_share: list[float] | None = None
    max_vio: float | None = None
    load_entropy: float | None = None
    dead_experts: float | None = None


def _batches(blocks: datasets.Dataset, batch_size: int) -> list[range]:
    """Rows of each batch; a block shorter than the others runs alone, so that none is padded."""
    full = sum(len(ids) == len(blocks[0]["input_ids"]) for ids in blocks["input_ids"])
    batches = [range(start, min(start + batch_size, full)) for start in range(0, full, batch_size)]
    return batches + [range(row, row + 1) for row in range(full, len(blocks))]


def _nats(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, asks: dict) -> tuple[float, Any]:
    """Cross entropy of the labels that are not -100, but for those of first tokens, summed; and the model's outputs."""
    outputs = model(input_ids=ids, use_cache=False, **asks)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item(), outputs


def _load(model: PreTrainedModel, outputs: Any, recorder: ExpertLoadRecorder) -> torch.Tensor | None:
    """Tokens sent to each expert, before any is dropped where the model tells that: (sparse layers, E) in float64."""
    recorded, own = recorder.take(), getattr(outputs, "expert_load", None)
    return recorded if own is None else own[:, : model.config.num_experts].double()


def _say_if_unseen(model: PreTrainedModel) -> None:
    if any("expert" in name for name, _ in model.named_modules()):
        logger.warning(
            f"The load of the experts is not shown: {type(model).__name__} does not call them by transformers' interface."
        )


@torch.no_grad()
def score(model: PreTrainedModel, blocks: datasets.Dataset, batch_size: int = 8, desc: str = "scoring") -> DomainScore:
    """Scores blocks of tokens, each on its own: all tokens that count but a block's first, which only is context.

    The batch size does not change the scores: no block is padded, and a capacity is that of each block. lm_eval pads the
    texts of a batch to the longest and tells the model nothing of it, so a model with `eval_capacity_factor` needs
    `--batch_size 1` there.

    Several processes share the batches, and all get the whole result: all must call it.

    Args:
        model: any causal LM, on the device to run on; its mode is left at evaluation.
        blocks: rows of `input_ids`, `num_bytes` and perhaps `labels`, -100 for a token that does not count; all of one
            length but the last; see [`~modeling_moe.data.documents.pack`].
        batch_size: blocks of one forward pass.
        desc: text of the progress bar.
    """
    model.eval()
    state = PartialState()
    metric, balance = BitsPerByte(keep_in_memory=True), RouterBalance(keep_in_memory=True)
    asks = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    batches = _batches(blocks, batch_size)
    own = batches[state.process_index :: state.num_processes]
    counts, load = bool(own), None
    with ExpertLoadRecorder(model) as recorder:
        # a rank without a batch of its own feeds zeros
        for rows in tqdm(own or batches[:1], desc=desc, disable=not state.is_local_main_process):
            batch = blocks[rows]
            labels = torch.tensor(batch.get("labels", batch["input_ids"]), device=model.device)
            nll_sum, outputs = _nats(model, torch.tensor(batch["input_ids"], device=model.device), labels, asks)
            counted = (labels[:, 1:] != -100).cpu()
            size = sum(
                sum(size for size, count in zip(sizes[1:], row.tolist(), strict=True) if count)
                for sizes, row in zip(batch["num_bytes"], counted, strict=True)
            )
            metric.add_batch(nll_sum=[nll_sum * counts], tokens=[counted.sum().item() * counts], bytes=[size * counts])
            load = _load(model, outputs, recorder)
            if load is not None:
                balance.add_batch(load=[(load * counts).tolist()])
    scores: Any = metric.compute(gather=True)
    if load is None:
        return DomainScore(**scores)
    routers: Any = balance.compute(gather=True)
    return DomainScore(**scores, max_vio=routers.pop("max_violation"), **routers)


def load_for_scoring(
    args: EvaluationArguments, data_args: DataArguments
) -> tuple[PreTrainedModel, dict[str, datasets.Dataset]]:
    """Loads a model, on its device, and the blocks of tokens of each domain: the whole text, or `max_tokens` of it.

    Raises:
        UserError: for an argument that cannot work.
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
            blocks = blocks.select(range(min(len(blocks), args.max_tokens // data_args.max_length)))
        domains[name] = blocks
    model = load_model(args.model_name_or_path, args.gguf_file, args.dtype, trust_remote_code=args.trust_remote_code)
    refuse_misfit(tokenizer, model)
    for blocks in domains.values():
        refuse_longer(model, len(blocks[0]["input_ids"]), f"max_length is {data_args.max_length}")
    return model.to(PartialState().device), domains


def evaluate_lm(args: EvaluationArguments, data_args: DataArguments) -> dict[str, DomainScore]:
    """Scores each domain's whole text, or its first `max_tokens` tokens, in blocks that do not overlap.

    Of conversations and completions it scores what the assistant says, or all tokens without `data_args.assistant_only`.

    Raises:
        UserError: for an argument that cannot work.
    """
    model, domains = load_for_scoring(args, data_args)
    scores = {name: score(model, blocks, args.batch_size, desc=name) for name, blocks in domains.items()}
    if all(score.max_vio is None for score in scores.values()):
        _say_if_unseen(model)
    return scores
