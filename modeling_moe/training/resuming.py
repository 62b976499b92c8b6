# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the checkpoint to resume from, and saves each file of the result completely or not at all."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..utils.errors import UserError
from ..utils.lineage import FINETUNING
from .arguments import ModelArguments
from .resume_state import STATE_FILE, check_resume_states, read_trainer_state


WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
CONFIGURATIONS = ("config.json", "adapter_config.json")
# files and folders that `Trainer` and `save_pretrained` write into a checkpoint
WRITTEN = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|pt|pth|bin|bin\.index\.json|py)"
    r"|(adapter_|generation_|tokenizer_)?config\.json|tokenizer.*\.json|tokenizer\.model|vocab\..*|merges\.txt"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template.*|trainer_state\.json|README\.md|latest"
    r"|optimizer(_\d+)?|pytorch_model_fsdp_\d+|global_step\d+"
)


def output_folder(args: TrainingArguments) -> Path:
    """Returns the folder for the result and the checkpoints.

    Raises:
        UserError: if `args` names none.
    """
    if args.output_dir is None:
        raise UserError("output_dir is missing: name the folder for the result and its checkpoints")
    return Path(args.output_dir)


def _is_whole(checkpoint: Path) -> bool:
    """Returns whether a checkpoint is complete: the trainer's state is written last."""
    try:
        read_trainer_state(checkpoint)
    except UserError:
        return False
    return True


def _last_checkpoint(folder: Path) -> str | None:
    """Returns the newest complete checkpoint in `folder`, or None."""
    whole = [checkpoint for checkpoint in folder.glob("checkpoint-*") if _is_whole(checkpoint)]
    return str(max(whole, key=lambda checkpoint: (checkpoint / STATE_FILE).stat().st_mtime_ns)) if whole else None


def checkpoint_to_resume(args: TrainingArguments, model_args: ModelArguments) -> str | None:
    """Returns the checkpoint to resume from, or None to start from the beginning.

    Raises:
        UserError: if the checkpoint asked for is missing, damaged or past the last step; or if `output_dir` has files
            that `overwrite` does not allow to replace, or that no fine-tuning wrote.
    """
    folder = output_folder(args)
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() == "true":
        resume = _last_checkpoint(folder)
        if resume is None and not folder.is_dir():
            raise UserError(
                f"resume_from_checkpoint: output_dir {folder} does not exist, omit resume_from_checkpoint to start anew"
            )
        if resume is None:
            raise UserError(
                f"resume_from_checkpoint: {folder} holds no complete checkpoint, pass --overwrite instead to start anew"
            )
    if resume is not None:
        _check_state(Path(resume), args.max_steps)
        return resume
    _refuse_occupied(folder, model_args)
    return None


def _check_state(checkpoint: Path, max_steps: int) -> None:
    # the folder of a result holds the state of the run, and no optimizer
    if not (checkpoint / STATE_FILE).is_file() or (checkpoint / FINETUNING).is_file():
        raise UserError(
            f"resume_from_checkpoint {checkpoint} is not a complete checkpoint: name one, or true for the last one"
        )
    step = read_trainer_state(checkpoint).global_step
    if 0 < max_steps < step:
        raise UserError(
            f"resume_from_checkpoint {checkpoint} is at step {step}, past max_steps {max_steps}: raise max_steps"
        )


def _refuse_occupied(folder: Path, model_args: ModelArguments) -> None:
    """Refuses an output folder with other files, or with the model to train."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not model_args.overwrite):
        raise UserError(
            f"output_dir {folder} is not empty: choose another, or pass --overwrite or --resume_from_checkpoint true"
        )
    source = Path(model_args.model_name_or_path).resolve()
    if source == folder.resolve():
        raise UserError(f"output_dir {folder} is the folder of the model to train: choose another")
    if source in [checkpoint.resolve() for checkpoint in folder.glob("checkpoint-*")]:
        raise UserError(f"model_name_or_path {source} is a checkpoint in output_dir, which overwrite deletes: move it")
    ours = (folder / FINETUNING).is_file() or any(folder.glob(f"checkpoint-*/{STATE_FILE}"))
    foreign = sorted(
        file.name for file in folder.glob("*") if WEIGHTS.fullmatch(file.name) or WRITTEN.fullmatch(file.name)
    )
    if foreign and not ours:
        raise UserError(f"output_dir {folder} holds {foreign[0]}, which no fine-tuning wrote: choose another")


def save_result(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, merge: bool) -> None:
    """Saves model, tokenizer and the trainer's state in `output_dir`, beside the checkpoints; each file is complete or absent."""
    output_dir = output_folder(trainer.args)
    partial = output_dir / ".partial"
    try:
        if not merge:
            trainer.save_model(str(partial))
        elif trainer.args.should_save:
            adapted = trainer.accelerator.unwrap_model(trainer.model)
            assert isinstance(adapted, PeftModel)  # `merge` is for adapters only
            adapted.merge_and_unload().save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if trainer.args.should_save:
            # `moe report --history` reads the log, also of a run without checkpoints
            trainer.state.save_to_json(str(partial / STATE_FILE))
            for stale in list(output_dir.iterdir()):
                if WEIGHTS.fullmatch(stale.name) or stale.name in CONFIGURATIONS:
                    stale.unlink()
            for file in partial.iterdir():
                os.replace(file, output_dir / file.name)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


class WholeCheckpointsTrainer(Trainer):
    """transformers' `Trainer` that marks complete checkpoints, and refuses to resume from a damaged one."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; a checkpoint is not complete until the trainer's state is written."""
        if _internal_call and output_dir is not None and self.args.should_save:
            (Path(output_dir) / STATE_FILE).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except UserError:
            raise
        except Exception as error:
            # safetensors, pickle, JSON, PEFT and torch have no common class of errors
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"resume_from_checkpoint {resume_from_checkpoint}: its weights cannot be loaded ({text[:300]}): resume from "
                "another checkpoint"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            process = self.args.process_index if self.args.world_size > 1 else None
            assert self.optimizer is not None  # `Trainer` makes it before it loads
            check_resume_states(checkpoint, self.optimizer, self.lr_scheduler, process)
        super()._load_optimizer_and_scheduler(checkpoint)


def discard_checkpoints(output_dir: Path) -> None:
    """Deletes the checkpoints of an earlier run, which a resumed run must not find; files that no run wrote stay."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        if not (checkpoint / STATE_FILE).is_file() or checkpoint.is_symlink():
            continue
        for file in checkpoint.iterdir():
            if WRITTEN.fullmatch(file.name) and not file.is_symlink():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        if not any(checkpoint.iterdir()):
            checkpoint.rmdir()
