#!/usr/bin/env python
"""Fine-tune a causal LM on text or conversations, sparse or dense: all weights, routers, attention, or LoRA.

    python scripts/finetune.py configuration/recipes/sft_lora.yaml --model_name_or_path ./moe --data wiki=wiki.txt
    python scripts/finetune.py --model_name_or_path ./moe --data wiki=wiki.txt code=code.jsonl --output_dir outputs/moe \\
        --method full --freeze_experts 0-7 --learning_rate 1e-4 --max_steps 200 --report_to tensorboard
    python scripts/finetune.py configuration/recipes/sft_router.yaml --model_name_or_path ./moe --data chat=chats/ \\
        --resume_from_checkpoint true
    python scripts/finetune.py configuration/recipes/pretrain.yaml --data wiki=wiki.txt --output_dir outputs/scratch \\
        --model_name_or_path configuration/models/moe_tiny.json --tokenizer_name ./dense
    accelerate launch --config_file configuration/accelerate/ddp.yaml scripts/finetune.py RECIPE.yaml
    torchrun --nproc_per_node 8 scripts/finetune.py RECIPE.yaml --fsdp_size 8 --ep_size 8 --merge_lora false

The first argument may be a recipe, whose keys are the flags below; flags after it win. Conversations (messages,
ShareGPT, Alpaca) go through the tokenizer's chat template, with the loss on what the assistant says, and prompts with
completions are plain text, with the loss on the completion; --assistant_only false: on all tokens. LoRA is merged when it is saved
(--merge_lora false: not). A run that was cut short goes on, with --resume_from_checkpoint true, as if it had not been; Ctrl-C
finishes the step and saves it, a second one stops at once. A loss
or gradient that is not finite stops the run and names the layer.
"""

import sys

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from modeling_moe.data import DataArguments
from modeling_moe.training import (
    FinetuneArguments,
    FinetuneResult,
    LoraArguments,
    ModelArguments,
    NonFiniteError,
    finetune,
    trained_parameters,
)
from modeling_moe.utils.command_line import parse, run


class PrintTrained(TrainerCallback):
    """Prints what is trained, before it is."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Prints a row for each part of the model."""
        if not state.is_world_process_zero:
            return
        counts = trained_parameters(kwargs["model"])
        table = Table("parameters", "trained", "of", "%")
        totals = {"all": tuple(map(sum, zip(*counts.values(), strict=True)))}
        for part, (trained, total) in (counts | totals).items():
            table.add_row(part, f"{trained:,}", f"{total:,}", f"{100 * trained / total:.2f}")
        Console().print(table)


def print_result(result: FinetuneResult, title: str) -> None:
    """Prints what the run did."""
    table = Table("", title)
    table.add_row("steps", f"{result.steps}")
    table.add_row("processes", f"{result.processes}")
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
    try:
        result = finetune(model_args, data_args, lora_args, args, [PrintTrained()])
    except NonFiniteError as error:
        if args.process_index == 0:
            print(f"finetune.py: {error}", file=sys.stderr, flush=True)
        PartialState().wait_for_everyone()  # the launcher ends all ranks when the first one exits
        sys.exit(2)
    if args.process_index == 0:
        print_result(result, args.output_dir)


if __name__ == "__main__":
    run(
        main,
        on_interrupt="the same flags with --resume_from_checkpoint true go on after the last checkpoint, if there is one",
    )
