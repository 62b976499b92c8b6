#!/usr/bin/env python
"""Fine-tune a causal LM on text, sparse or dense: all weights, or LoRA that is merged when it is saved.

    python scripts/finetune.py configuration/recipes/sft_lora.yaml --model_name_or_path ./moe --data wiki=wiki.txt
    python scripts/finetune.py --model_name_or_path ./moe --data wiki=wiki.txt code=code.jsonl --output_dir outputs/moe \\
        --method full --learning_rate 1e-4 --max_steps 200 --gradient_checkpointing true
    accelerate launch --config_file configuration/accelerate/ddp.yaml scripts/finetune.py RECIPE.yaml

The first argument may be a recipe, whose keys are the flags below; flags after it win.
"""

from rich.console import Console
from rich.table import Table

from modeling_moe.cli import parse, run
from modeling_moe.training import (
    DataArguments,
    FinetuneArguments,
    FinetuneResult,
    LoraArguments,
    ModelArguments,
    finetune,
)


def print_result(result: FinetuneResult, title: str) -> None:
    """Prints what the run did."""
    table = Table("", title)
    table.add_row("steps", f"{result.steps}")
    table.add_row("trained parameters", f"{result.trained_params:,}")
    table.add_row("training loss, first and last quarter", f"{result.first_loss:.4f}, {result.last_loss:.4f}")
    for domain, loss in result.eval_loss.items():
        table.add_row(f"held-out loss, {domain}", f"{loss:.4f}")
    table.add_row("seconds", f"{result.seconds:.1f}")
    table.add_row("tokens per second", f"{result.tokens_per_second:,.0f}")
    Console().print(table)


def main() -> None:
    """Trains, saves and prints."""
    model_args, data_args, lora_args, args = parse(
        [ModelArguments, DataArguments, LoraArguments, FinetuneArguments], __doc__
    )
    result = finetune(model_args, data_args, lora_args, args)
    if args.process_index == 0:
        print_result(result, args.output_dir)


if __name__ == "__main__":
    run(main)
