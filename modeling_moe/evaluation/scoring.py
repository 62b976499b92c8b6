# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module scores how well a causal LM predicts text, and how evenly its routers use the experts."""

from dataclasses import dataclass, field

import datasets
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..data import DataArguments, one_table, packer
from ..monitoring import ExpertLoadRecorder
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
    """The scores of a model on the text of one domain; the figures about experts are None for a dense model.

    Attributes:
        loss: cross entropy in nats per token.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the scored tokens; comparable between tokenizers.
        tokens: number of scored tokens.
        bytes: number of UTF-8 bytes of the scored tokens.
        expert_share: share of the assignments that each of the E experts received, averaged over the sparse layers.
        max_vio: largest load divided by the mean load, minus 1, averaged over the sparse layers (0 is balanced).
        load_entropy: entropy of the shares of the load in nats, averaged over the sparse layers (log(E) is balanced).
        dead_experts: share of the experts without a token, averaged over the sparse layers.
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
    """Returns the rows of each batch. A block that is shorter than the others gets a batch alone, so none is padded."""
    full = sum(len(ids) == len(blocks[0]["input_ids"]) for ids in blocks["input_ids"])
    batches = [range(start, min(start + batch_size, full)) for start in range(0, full, batch_size)]
    return batches + [range(row, row + 1) for row in range(full, len(blocks))]


def _nats(
    model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, options: dict[str, bool]
) -> tuple[float, ModelOutput]:
    """Returns the summed cross entropy in nats of the labels (B, S) that are not -100, and the outputs of the model.

    The first token of a block is not predicted.
    """
    outputs = model(input_ids=ids, use_cache=False, **options)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item(), outputs


def _load(model: PreTrainedModel, outputs: ModelOutput, recorder: ExpertLoadRecorder) -> torch.Tensor | None:
    """Returns the tokens sent to each expert, (sparse layers, E) in float64, or None for a model without experts.

    The counts of this package's model include dropped assignments; the recorder sees what reaches the experts.
    """
    recorded, counted = recorder.take(), getattr(outputs, "expert_load", None)
    return recorded if counted is None else counted[:, : model.config.num_experts].double()


def _warn_of_unseen_experts(model: PreTrainedModel) -> None:
    if any("expert" in name for name, _ in model.named_modules()):
        logger.warning(
            f"The load of the experts is not shown: {type(model).__name__} does not call them by transformers' interface."
        )


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
    metric, balance = BitsPerByte(keep_in_memory=True), RouterBalance(keep_in_memory=True)
    options = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    batches = _batches(blocks, batch_size)
    mine = batches[state.process_index :: state.num_processes]
    counts, load = bool(mine), None
    with ExpertLoadRecorder(model) as recorder:
        # a process without a batch runs the first one too, and adds zeros
        for rows in tqdm(mine or batches[:1], desc=desc, disable=not state.is_local_main_process):
            batch = blocks[rows]
            labels = torch.tensor(batch.get("labels", batch["input_ids"]), device=model.device)
            nll_sum, outputs = _nats(model, torch.tensor(batch["input_ids"], device=model.device), labels, options)
            counted = (labels[:, 1:] != -100).cpu()
            size = sum(
                sum(size for size, count in zip(sizes[1:], row.tolist(), strict=True) if count)
                for sizes, row in zip(batch["num_bytes"], counted, strict=True)
            )
            metric.add_batch(nll_sum=[nll_sum * counts], tokens=[counted.sum().item() * counts], bytes=[size * counts])
            load = _load(model, outputs, recorder)
            if load is not None:
                balance.add_batch(load=[(load * counts).tolist()])
    scores = metric.compute(gather=True)
    routers = balance.compute(gather=True) if load is not None else {"max_violation": None}
    # evaluate returns None only to the other processes of its own way of sharing
    assert scores is not None
    assert routers is not None
    return DomainScore(**scores, max_vio=routers.pop("max_violation"), **routers)


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
