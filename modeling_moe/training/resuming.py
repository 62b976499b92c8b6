# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""An output folder and its checkpoints: which one to go on from, and files that are whole or not there."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..cli import UserError
from .arguments import ModelArguments


STATE_FILE = "trainer_state.json"
REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last."""
    try:
        return isinstance(json.loads((checkpoint / STATE_FILE).read_text()), dict)
    except (OSError, ValueError):
        return False


def _last_checkpoint(folder: Path) -> str | None:
    """The checkpoint that was finished last, not one in whose writing a run was killed."""
    whole = [checkpoint for checkpoint in folder.glob("checkpoint-*") if _is_whole(checkpoint)]
    return str(max(whole, key=lambda checkpoint: (checkpoint / STATE_FILE).stat().st_mtime_ns)) if whole else None


def checkpoint_to_resume(args: TrainingArguments, model_args: ModelArguments) -> str | None:
    """Checkpoint to resume from, if any.

    Raises:
        UserError: if there is none that is asked for, or `output_dir` has files that nobody said to overwrite.
    """
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() == "true":
        resume = _last_checkpoint(folder)
        if resume is None:
            raise UserError(
                f"resume_from_checkpoint: {folder} holds no checkpoint that is whole, pass --overwrite instead to start anew"
            )
    if resume is not None and not _is_whole(Path(resume)):
        raise UserError(f"resume_from_checkpoint {resume} is no whole checkpoint: name one, or true for the last one")
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and resume is None and not model_args.overwrite:
        raise UserError(
            f"output_dir {folder} is not empty: choose another, or pass --overwrite or --resume_from_checkpoint true"
        )
    source = Path(model_args.model_name_or_path).resolve()
    if resume is None and source in [checkpoint.resolve() for checkpoint in folder.glob("checkpoint-*")]:
        raise UserError(f"model_name_or_path {source} is a checkpoint in output_dir, which overwrite deletes: move it")
    return resume


def save_result(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, merge: bool) -> None:
    """Saves model and tokenizer in `output_dir`, beside the checkpoints: each file is whole or not there."""
    output_dir = Path(trainer.args.output_dir)
    partial = output_dir / ".partial"
    try:
        if not merge:
            trainer.save_model(str(partial))
        elif trainer.args.should_save:
            model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if trainer.args.should_save:
            for pattern in REPLACED:
                for stale in output_dir.glob(pattern):
                    stale.unlink()
            for file in partial.iterdir():
                os.replace(file, output_dir / file.name)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


class WholeCheckpointsTrainer(Trainer):
    """transformers' `Trainer` whose checkpoints tell whether they are whole."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; a checkpoint that it is part of is not whole until its state is written."""
        if _internal_call and output_dir is not None and self.args.should_save:
            (Path(output_dir) / STATE_FILE).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)


def discard_checkpoints(output_dir: Path) -> None:
    """Deletes those of another run, for one that resumes here must not find them."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
