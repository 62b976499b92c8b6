# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command trains a causal LM, sparse or dense, on text or conversations: all weights, routers, attention, or LoRA.

    moe finetune sft_lora --model_name_or_path ./moe --data wiki=wiki.txt --output_dir outputs/moe
    moe finetune --model_name_or_path ./moe --data wiki=wiki.txt code=code.jsonl --output_dir outputs/moe \\
        --method full --freeze_experts 0-7 --learning_rate 1e-4 --max_steps 200 --report_to tensorboard
    moe finetune sft_router --model_name_or_path ./moe --data chat=chats/ --output_dir outputs/moe --resume_from_checkpoint true
    moe finetune sft_router --model_name_or_path ./moe --data chat=chats/ --output_dir outputs/moe --max_length 192 \\
        --meta_support_tokens 64 --per_device_train_batch_size 1 --gradient_accumulation_steps 8
    moe finetune pretrain --model_name_or_path moe_tiny --tokenizer_name ./dense --data wiki=wiki.txt \\
        --output_dir outputs/scratch
    moe finetune long_run --model_name_or_path ./moe --data wiki=wiki.txt --output_dir outputs/long
    accelerate launch --config_file configuration/accelerate/ddp.yaml -m modeling_moe finetune RECIPE
    torchrun --nproc_per_node 8 -m modeling_moe finetune RECIPE --fsdp_size 8 --ep_size 8 --merge_lora false

The first argument may be a recipe: a YAML file whose keys are the flags below, or the name of a recipe of the package
(`moe presets` lists them); flags after it win. Conversations (messages, ShareGPT, Alpaca) go through the tokenizer's chat
template, with the loss on what the assistant says; prompts with completions are plain text, with the loss on the completion.
--assistant_only false sets the loss on all tokens. transformers' own MoE models train with this package's balance loss if the
model's configuration has a positive router_aux_loss_coef; --router_bias_update_rate 0.001 moves their selection biases. LoRA is
merged when it is saved, unless --merge_lora false is given.

The progress bar shows the loss and MaxVio, the busiest expert's load over the mean load, less 1. The trackers of --report_to and
trainer_state.json get all figures of the routing, which `moe report --history OUTPUT_DIR` draws; --routing_steps sets how often,
and 0 switches them off. Ctrl-C finishes the step and saves it, and a second Ctrl-C stops at once; the same command with
--resume_from_checkpoint true goes on to the same weights as a run that was not stopped. A loss or gradient that is not finite
stops the run, and the message names the layer.

For long runs, --role_rates and --role_decays set the learning rate and the weight decay by role, --muon trains each matrix
of each expert by Muon, --router_average evaluates with averaged routers, --sample_steps logs what the model writes, and
--collapse_steps ends a run whose routing collapses, and names the layer. A run resumes to the same weights with each of them.
"""

import sys
from collections.abc import Sequence

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import DataArguments
from ..training import (
    BalanceArguments,
    CollapseError,
    FinetuneArguments,
    FinetuneResult,
    LongRunArguments,
    LoraArguments,
    MetaArguments,
    ModelArguments,
    NonFiniteError,
    finetune,
    trained_parameters,
)
from ..utils.command_line import parse, program


class PrintTrained(TrainerCallback):
    """This callback prints how many parameters are trained, before training starts."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Prints a row for each part of the model."""
        if not state.is_world_process_zero:
            return
        counts = trained_parameters(kwargs["model"])
        table = Table("parameters", "trained", "of the model's", "%")
        totals = (sum(trained for trained, _ in counts.values()), sum(total for _, total in counts.values()))
        for part, (trained, total) in [*counts.items(), ("all", totals)]:
            table.add_row(part, f"{trained:,}", f"{total:,}", f"{100 * trained / total:.2f}")
        Console().print(table)


def print_result(result: FinetuneResult, title: str) -> None:
    """Prints the losses and the speed of a run."""
    rows = [
        ("steps", f"{result.steps}"),
        ("processes", f"{result.processes}"),
        ("trained parameters", f"{result.trained_params:,}"),
        ("training loss, first and last quarter", f"{result.first_loss:.4f}, {result.last_loss:.4f}"),
        *((f"held-out loss, {domain}", f"{loss:.4f}") for domain, loss in result.eval_loss.items()),
        ("seconds", f"{result.seconds:.1f}"),
        ("tokens per second", f"{result.tokens_per_second:,.0f}"),
    ]
    table = Table("", title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and prints."""
    groups = [
        ModelArguments,
        DataArguments,
        LoraArguments,
        BalanceArguments,
        LongRunArguments,
        MetaArguments,
        FinetuneArguments,
    ]
    model_args, data_args, lora_args, balance_args, run_args, meta_args, args = parse(groups, __doc__, argv)
    try:
        result = finetune(model_args, data_args, lora_args, args, [PrintTrained()], balance_args, run_args, meta_args)
    except (NonFiniteError, CollapseError) as error:
        if args.process_index == 0:
            print(f"{program()}: {error}", file=sys.stderr, flush=True)
        PartialState().wait_for_everyone()  # the launcher ends all ranks when the first one exits
        sys.exit(2)
    if args.process_index == 0:
        print_result(result, args.output_dir)
