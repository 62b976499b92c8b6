#!/usr/bin/env python
"""How well a causal LM predicts texts, and how evenly its experts share the work, domain by domain.

    python scripts/eval_lm.py --model_name_or_path ./moe --data wiki=wiki.txt code=code.jsonl
    python scripts/eval_lm.py --model_name_or_path ./moe --data wiki=Salesforce/wikitext:wikitext-2-raw-v1 --split test \\
        --max_tokens 65536 --output_json scores.json
    python scripts/eval_lm.py --model_name_or_path ./dense --gguf_file model.gguf --data wiki=wiki.txt
    python scripts/eval_lm.py --model_name_or_path ./moe --data chat=chats.jsonl

Documents are joined by the tokenizer's eos and cut into blocks of --max_length tokens that do not overlap. A block is
scored on its own, all tokens but its first; of conversations and completions only what the assistant says, as finetune.py
trains on it, or all tokens with --assistant_only false. Bits per byte divide by the UTF-8 bytes that the scored tokens stand for,
which makes models with different tokenizers comparable; a special token has none. MaxVio is the busiest expert's load over the mean load, less 1.
"""

import json
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from modeling_moe.data import DataArguments
from modeling_moe.evaluation import DomainScore, EvaluationArguments, evaluate_lm
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError


MAX_SHARES = 16


def print_scores(scores: dict[str, DomainScore], title: str) -> None:
    """Prints one row for each domain; the experts' columns only if there are any."""
    sparse = any(score.max_vio is not None for score in scores.values())
    table = Table("domain", "tokens", "loss", "perplexity", "bits per byte", title=title)
    if sparse:
        table.add_column("MaxVio")
        table.add_column("% of tokens per expert")
    for domain, score in scores.items():
        row = [
            domain,
            f"{score.tokens:,}",
            f"{score.loss:.4f}",
            f"{score.perplexity:.3f}",
            f"{score.bits_per_byte:.4f}",
        ]
        if score.expert_share is not None:
            shares = [f"{100 * share:.1f}" for share in score.expert_share]
            if len(shares) > MAX_SHARES:
                shares = [f"{100 * min(score.expert_share):.2f} to {100 * max(score.expert_share):.2f}"]
            row += [f"{score.max_vio:.3f}", " ".join(shares)]
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Evaluates, writes the results if asked to, and prints them."""
    args, data_args = parse([EvaluationArguments, DataArguments], __doc__)
    output = Path(args.output_json) if args.output_json else None
    if output is not None and not output.parent.is_dir():
        raise UserError(f"output_json {output}: make the folder {output.parent} first")
    scores = evaluate_lm(args, data_args)
    if not PartialState().is_main_process:
        return
    if output is not None:
        partial = output.with_name(f".{output.name}.partial")
        partial.write_text(json.dumps({domain: asdict(score) for domain, score in scores.items()}, indent=2) + "\n")
        partial.rename(output)
    print_scores(scores, args.model_name_or_path)


if __name__ == "__main__":
    run(main)
