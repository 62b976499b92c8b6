# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command measures how well a causal LM predicts texts, and how evenly its experts share the work, by domain.

    moe eval --model_name_or_path ./moe --data wiki=wiki.txt code=code.jsonl
    moe eval --model_name_or_path ./moe --data wiki=Salesforce/wikitext:wikitext-2-raw-v1 --split test \\
        --max_tokens 65536 --output_json scores.json
    moe eval --model_name_or_path ./dense --gguf_file model.gguf --data wiki=wiki.txt
    moe eval --model_name_or_path ./moe --data chat=chats.jsonl

Documents are joined by the tokenizer's eos and cut into blocks of --max_length tokens that do not overlap. A block is
scored alone, all tokens but the first. Of conversations and completions only what the assistant says is scored, as `moe
finetune` trains on it, or all tokens with --assistant_only false. Bits per byte divide by the UTF-8 bytes of the scored
tokens, so that models with different tokenizers compare; a special token has no bytes.

The figures of the experts are means over the sparse layers of any Mixture of Experts in transformers whose experts follow its
experts interface. MaxVio is the busiest expert's load over the mean load, less 1. Router entropy is the mean entropy of a
token's probabilities, and the entropy of the mean probabilities, in nats: a sure router has a low first one, a collapsed
router a low second one.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from ..data import DataArguments
from ..evaluation import DomainScore, EvaluationArguments, evaluate_lm
from ..utils.command_line import parse, refuse_missing_folder
from ..utils.json_files import write_json


# a table shows the share of each expert up to this number of experts, and the smallest and largest share beyond
MAX_SHARES = 16


def _shares(score: DomainScore) -> str:
    """Returns the share of each expert in percent, or the smallest and largest share of many or different layers."""
    if score.expert_share is not None and len(score.expert_share) <= MAX_SHARES:
        return " ".join(f"{100 * share:.1f}" for share in score.expert_share)
    shares = score.expert_share or [load / max(sum(layer), 1) for layer in score.expert_load or [] for load in layer]
    return f"{100 * min(shares):.2f} to {100 * max(shares):.2f}"


def _entropies(score: DomainScore) -> str:
    if score.token_entropy is None or score.marginal_entropy is None:
        return "unknown"
    return f"{score.token_entropy:.2f}, {score.marginal_entropy:.2f}"


# title of a column of the experts' table -> its text; a column is left out if its text is empty in all rows
EXPERT_COLUMNS: dict[str, Callable[[DomainScore], str]] = {
    "MaxVio": lambda score: f"{score.max_vio:.3f}",
    "% dead": lambda score: f"{100 * (score.dead_experts or 0):.1f}",
    "% dropped": lambda score: f"{100 * score.dropped_share:.1f}" if score.dropped_share else "",
    "router entropy": _entropies,
    "% of tokens per expert": _shares,
}


def print_scores(scores: dict[str, DomainScore], title: str) -> None:
    """Prints a table with one row for each domain, and one about the experts if the model has experts.

    Two tables fit into a terminal of 80 columns, where one table would cut numbers off.
    """
    console = Console()
    table = Table("domain", "tokens", "loss", "perplexity", "bits per byte", title=title)
    for domain, score in scores.items():
        figures = (f"{score.loss:.4f}", f"{score.perplexity:.3f}", f"{score.bits_per_byte:.4f}")
        table.add_row(domain, f"{score.tokens:,}", *figures)
    console.print(table)
    if any(score.max_vio is None for score in scores.values()):
        return
    columns = {name: [text(score) for score in scores.values()] for name, text in EXPERT_COLUMNS.items()}
    columns = {name: texts for name, texts in columns.items() if any(texts)}
    table = Table("domain", *columns, title=f"{title}, experts")
    for domain, *texts in zip(scores, *columns.values(), strict=True):
        table.add_row(domain, *texts)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates, writes the results if asked to, and prints them."""
    args, data_args = parse([EvaluationArguments, DataArguments], __doc__, argv)
    refuse_missing_folder(output_json=args.output_json)
    scores = evaluate_lm(args, data_args)
    if not PartialState().is_main_process:
        return
    if args.output_json is not None:
        write_json(Path(args.output_json), {domain: asdict(score) for domain, score in scores.items()})
    print_scores(scores, args.model_name_or_path)
