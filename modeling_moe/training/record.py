# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes `finetuning.json`, which records how a model was fine-tuned, for the model card."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

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


class LossChange(NamedTuple):
    """The means of the first and of the last quarter of the logged values of a loss."""

    first: float
    last: float


def logged_losses(log_history: Iterable[Mapping[str, Any]]) -> dict[str, LossChange]:
    """Returns how each training loss changed, by the name under which it was logged.

    Args:
        log_history: entries as in `TrainerState.log_history`; the values whose name is `loss` or ends in `_loss` count,
            without those of evaluations and the mean `train_loss` of the whole run.
    """
    values: dict[str, list[float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            last = name.rpartition("/")[2]
            if not name.startswith(("eval_", "train_")) and (last == "loss" or last.endswith("_loss")):
                values.setdefault(name, []).append(value)
    quarters = {name: max(1, len(losses) // 4) for name, losses in values.items()}
    return {name: LossChange(fmean(v[: quarters[name]]), fmean(v[-quarters[name] :])) for name, v in values.items()}


def _place(source: str) -> str:
    """Returns the absolute path of a file or folder, which no reader can take for a name on the Hub; else the name itself."""
    return str(Path(source).resolve()) if Path(source).exists() else source


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
    numbers: Mapping[str, Any],
    eval_loss: dict[str, float],
) -> None:
    """Writes `finetuning.json`, and copies `conversion.json` from the folder of the source model.

    Names on the Hub are recorded as the user gave them, files and folders by their absolute paths, which a card and an
    upload shorten; a folder in the Hub's cache is recorded by its name on the Hub.

    Args:
        output_dir: folder of the saved model.
        model_args: the model, and the weights that were trained.
        data_args: the data.
        lora_args: the adapter, recorded for the method `lora` only.
        args: the training.
        state: the trainer's state after the last step; steps and losses before a resumption count.
        numbers: further entries, such as `tokens` (of all steps), `trained_parameters` and, for a model of transformers that
            [`~modeling_moe.training.balance.balance`] balanced, the settings `balance`.
        eval_loss: cross entropy in nats per token on the held-out text of each domain.
    """
    source = model_args.model_name_or_path
    record = {
        "base_model": hub_name(source) or _place(source) if Path(source).is_dir() else source,
        "method": model_args.method,
        "data": {domain: _place(source) for domain, source in data_args.domains().items()},
        "steps": state.global_step,
        **numbers,
        "max_length": data_args.max_length,
        "batch_size": _sequences(model_args, args),
        "learning_rate": args.learning_rate,
        "optimizer": getattr(args.optim, "value", args.optim),
        **({name: getattr(lora_args, name) for name in LORA_SETTINGS} if model_args.method == "lora" else {}),
        "seed": args.seed,
        "loss": {name: change._asdict() for name, change in logged_losses(state.log_history).items()},
        "eval_loss": eval_loss,
        "modeling_moe_version": __version__,
    }
    write_json(output_dir / FINETUNING, record)
    if (Path(source) / CONVERSION).is_file():
        shutil.copyfile(Path(source) / CONVERSION, output_dir / CONVERSION)
    else:
        # the file of a run that this run has overwritten
        (output_dir / CONVERSION).unlink(missing_ok=True)
