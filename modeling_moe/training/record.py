# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a fine-tuned model was made from, kept beside it for its card: `finetuning.json`, and its source's `conversion.json`."""

import json
import shutil
from pathlib import Path

from transformers import TrainingArguments

from ..compatibility import __version__
from ..data.documents import DataArguments
from ..utils.atomic import write_text
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
    """Writes `finetuning.json`, and copies a local source's `conversion.json`.

    Names are kept as the user gave them, a source in the Hub's cache by its name on the Hub.

    Args:
        output_dir: where the model was saved.
        model_args: what was trained.
        data_args: on what.
        args: how.
        steps: optimizer steps, those before a resumption included.
        tokens: tokens of all these steps.
        eval_loss: nats per token of each domain's held-out text.
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
    write_text(output_dir / FINETUNING, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if (Path(source) / CONVERSION).is_file():
        shutil.copyfile(Path(source) / CONVERSION, output_dir / CONVERSION)
    else:
        # of a run that this one has overwritten
        (output_dir / CONVERSION).unlink(missing_ok=True)
