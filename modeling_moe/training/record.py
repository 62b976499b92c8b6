# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes `finetuning.json`, which records how a model was fine-tuned, for the model card."""

import shutil
from pathlib import Path

from transformers import TrainingArguments

from ..compatibility import __version__
from ..data import DataArguments
from ..utils.json_files import write_json
from ..utils.lineage import CONVERSION, FINETUNING, hub_name
from .arguments import ModelArguments


def write_record(
    output_dir: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    steps: int,
    tokens: int,
    eval_loss: dict[str, float],
) -> None:
    """Writes `finetuning.json`, and copies `conversion.json` from the folder of the source model.

    The record keeps names as the user gave them; a folder in the Hub's cache is recorded by its name on the Hub.

    Args:
        output_dir: folder of the saved model.
        model_args: the model, and the weights that were trained.
        data_args: the data.
        args: the training.
        steps: optimizer steps, including those before a resumption.
        tokens: tokens of all these steps.
        eval_loss: cross entropy in nats per token on the held-out text of each domain.
    """
    source = model_args.model_name_or_path
    record = {
        "base_model": (hub_name(source) if Path(source).is_dir() else None) or source,
        "method": model_args.method,
        "data": data_args.domains(),
        "steps": steps,
        "tokens": tokens,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "eval_loss": eval_loss,
        "modeling_moe_version": __version__,
    }
    write_json(output_dir / FINETUNING, record)
    if (Path(source) / CONVERSION).is_file():
        shutil.copyfile(Path(source) / CONVERSION, output_dir / CONVERSION)
    else:
        # the file of a run that this run has overwritten
        (output_dir / CONVERSION).unlink(missing_ok=True)
