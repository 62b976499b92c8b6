# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How well a causal LM predicts a text, and how evenly its routers spread it over the experts."""

import math
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..cli import UserError
from ..files import load_source, load_tokenizer
from ..metrics import max_violation
from .data import DataArguments, pack


@dataclass
class EvaluationArguments:
    """Which model to evaluate and how."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM, sparse or dense"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16"})
    batch_size: int = field(default=8, metadata={"help": "blocks of one forward pass"})
    max_tokens: int | None = field(default=None, metadata={"help": "read no more tokens of a domain; whole blocks"})
    output_json: str | None = field(default=None, metadata={"help": "file for the results"})

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")


class BitsPerByte(evaluate.Metric):
    """Loss, perplexity and bits per byte from sums over batches; needs no download.

    Example:
        >>> metric = BitsPerByte(keep_in_memory=True)
        >>> metric.add_batch(nll_sum=[6.0, 2.0], tokens=[3, 1], bytes=[10, 2])
        >>> metric.compute()["loss"]
        2.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Loss in nats per token, perplexity, and bits per UTF-8 byte of the text predicted.",
            citation="",
            inputs_description="nll_sum: nats of a batch; tokens: tokens predicted in it; bytes: UTF-8 bytes they are.",
            features=datasets.Features(
                {
                    "nll_sum": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nll_sum, tokens, bytes) -> dict[str, float | int]:
        nats, tokens, bytes = math.fsum(nll_sum), sum(tokens), sum(bytes)
        return {
            "loss": nats / tokens,
            "perplexity": math.exp(min(nats / tokens, 700.0)),
            "bits_per_byte": nats / math.log(2) / bytes if bytes else math.nan,
            "tokens": tokens,
            "bytes": bytes,
        }


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
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    expert_share: list[float] | None = None
    max_vio: float | None = None


def balance(load: torch.Tensor) -> tuple[list[float], float]:
    """Share of each expert and MaxVio (arXiv:2408.15664), both averaged over layers.

    Args:
        load: (sparse layers, E), tokens that each expert received.
    """
    load = load.double()
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    return share.mean(dim=0).tolist(), max_violation(load).mean().item()


@torch.no_grad()
def score(model: PreTrainedModel, blocks: datasets.Dataset, batch_size: int = 8, desc: str = "scoring") -> DomainScore:
    """Scores blocks of tokens, each on its own: all tokens but a block's first, which only is context.

    Args:
        model: any causal LM, on the device to run on; its mode is left at evaluation.
        blocks: rows of `input_ids` and `num_bytes`, all of one length but the last; see
            [`~modeling_moe.training.data.pack`].
        batch_size: blocks of one forward pass.
        desc: text of the progress bar.
    """
    model.eval()
    metric, load = BitsPerByte(keep_in_memory=True), None
    asks = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    full = sum(len(ids) == len(blocks[0]["input_ids"]) for ids in blocks["input_ids"])
    # a shorter block runs alone, so that none is padded
    starts = [*range(0, full, batch_size), *range(full, len(blocks))]
    for start in tqdm(starts, desc=desc):
        rows = blocks[start : min(start + batch_size, full) if start < full else start + 1]
        ids = torch.tensor(rows["input_ids"], device=model.device)
        outputs = model(input_ids=ids, use_cache=False, **asks)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll_sum = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        tokens, size = ids[:, 1:].numel(), sum(sum(sizes[1:]) for sizes in rows["num_bytes"])
        metric.add_batch(nll_sum=[nll_sum], tokens=[tokens], bytes=[size])
        batch_load = getattr(outputs, "expert_load", None)
        if batch_load is not None:
            load = batch_load.double() + (0 if load is None else load)
    share, max_vio = (None, None) if load is None else balance(load)
    scores: Any = metric.compute()
    return DomainScore(**scores, expert_share=share, max_vio=max_vio)


def evaluate_lm(args: EvaluationArguments, data_args: DataArguments) -> dict[str, DomainScore]:
    """Scores each domain's whole text, or its first `max_tokens` tokens, in blocks that do not overlap.

    Raises:
        UserError: for an argument that cannot work.
    """
    if args.max_tokens is not None and args.max_tokens < data_args.max_length:
        raise UserError(
            f"max_tokens {args.max_tokens} is less than a block of max_length {data_args.max_length}: raise it"
        )
    texts = data_args.load()
    tokenizer = load_tokenizer(args.model_name_or_path, args.gguf_file)
    domains = {}
    for name, documents in texts.items():
        blocks = pack(documents, tokenizer, data_args.max_length, for_scoring=True)
        if len(blocks) == 0:
            raise UserError(f"data {name!r} has fewer than the 2 tokens that a score needs: give more text")
        if args.max_tokens is not None:
            blocks = blocks.select(range(min(len(blocks), args.max_tokens // data_args.max_length)))
        domains[name] = blocks
    model = load_source(args.model_name_or_path, args.gguf_file, args.dtype).to(PartialState().device)
    return {name: score(model, blocks, args.batch_size, desc=name) for name, blocks in domains.items()}
