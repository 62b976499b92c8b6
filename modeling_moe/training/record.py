# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes `finetuning.json`, which records how a model was fine-tuned, for the model card."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..compatibility import __version__
from ..data import DataArguments
from ..utils.json_files import write_json
from ..utils.lineage import CONVERSION, FINETUNING, hub_name
from .arguments import LoraArguments, ModelArguments


# settings of LoRA that change what is trained
LORA_SETTINGS = (
    *("lora_r", "lora_rank_per", "lora_alpha", "lora_dropout", "use_rslora", "lora_target_modules"),
    *("lora_experts", "lora_shared", "lora_router"),
)


def logged_losses(log_history: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns the first and the last logged value of each training loss, by the name under which it was logged.

    Args:
        log_history: entries as in `TrainerState.log_history`; the values whose name is `loss` or ends in `_loss` count,
            without those of evaluations and the mean `train_loss` of the whole run.
    """
    losses: dict[str, list[float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            last = name.rpartition("/")[2]
            if name.startswith(("eval_", "train_")) or not (last == "loss" or last.endswith("_loss")):
                continue
            losses[name] = [losses.get(name, [value])[0], value]
    return losses


def _sequences(model_args: ModelArguments, args: TrainingArguments) -> int:
    """Returns the number of sequences of an optimizer step, over all processes; tensor parallelism shares sequences."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size // model_args.tp_size


def write_record(
    output_dir: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    args: TrainingArguments,
    state: TrainerState,
    counts: Mapping[str, int],
    eval_loss: dict[str, float],
) -> None:
    """Writes `finetuning.json`, and copies `conversion.json` from the folder of the source model.

    The record keeps names as the user gave them; a folder in the Hub's cache is recorded by its name on the Hub.

    Args:
        output_dir: folder of the saved model.
        model_args: the model, and the weights that were trained.
        data_args: the data.
        lora_args: the adapter, recorded for the method `lora` only.
        args: the training.
        state: the trainer's state after the last step; steps and losses before a resumption count.
        counts: further numbers, such as `tokens` (of all steps) and `trained_parameters`.
        eval_loss: cross entropy in nats per token on the held-out text of each domain.
    """
    source = model_args.model_name_or_path
    record = {
        "base_model": (hub_name(source) if Path(source).is_dir() else None) or source,
        "method": model_args.method,
        "data": data_args.domains(),
        "steps": state.global_step,
        **counts,
        "max_length": data_args.max_length,
        "batch_size": _sequences(model_args, args),
        "learning_rate": args.learning_rate,
        "optimizer": getattr(args.optim, "value", args.optim),
        **({name: getattr(lora_args, name) for name in LORA_SETTINGS} if model_args.method == "lora" else {}),
        "seed": args.seed,
        "loss": logged_losses(state.log_history),
        "eval_loss": eval_loss,
        "modeling_moe_version": __version__,
    }
    write_json(output_dir / FINETUNING, record)
    if (Path(source) / CONVERSION).is_file():
        shutil.copyfile(Path(source) / CONVERSION, output_dir / CONVERSION)
    else:
        # the file of a run that this run has overwritten
        (output_dir / CONVERSION).unlink(missing_ok=True)
