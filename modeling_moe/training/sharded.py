# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints to resume from, of a model that transformers' `DistributedConfig` has split over processes."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer import SCHEDULER_NAME

from ..utils.errors import UserError


try:
    _checkpoint: Any = import_module("transformers.distributed.checkpoint")
except ImportError:  # transformers before it had a module for them
    _checkpoint: Any = import_module("transformers.distributed.utils")
OPTIMIZER_FOLDER = "optimizer"


def is_split(model: Any) -> bool:
    """Whether `from_pretrained(..., distributed_config=...)` has split the model, with an adapter on it or not."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


class ShardedResumeMixin:
    """Put it before a `Trainer` class: its checkpoints of a split model hold the optimizer's state too.

    transformers saves the weights of such a model, gathered, and refuses the rest. Here each process writes its part of the
    optimizer's state (`torch.distributed.checkpoint`). The weights come from the checkpoint by `from_pretrained`, and adapters
    by PEFT, before training goes on.

    Raises:
        UserError: in resuming, if the model was not loaded from the checkpoint.
    """

    def __init__(self: Any, model: Any = None, args: Any = None, *others, **kwargs):
        trainer: Any = super()
        if args is None or not is_split(model):
            trainer.__init__(model, args, *others, **kwargs)
            return
        # else transformers raises, for want of what is below
        only_model, args.save_only_model = args.save_only_model, True
        try:
            trainer.__init__(model, args, *others, **kwargs)
        finally:
            args.save_only_model = only_model

    def create_optimizer(self: Any, *args, **kwargs) -> torch.optim.Optimizer:
        """transformers' own."""
        trainer: Any = super()
        optimizer = trainer.create_optimizer(*args, **kwargs)
        if is_split(self.model):
            # torch.distributed.checkpoint looks at each group's first parameter
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        trainer: Any = super()
        if not is_split(self.model):
            trainer._save_optimizer_and_scheduler(output_dir)
            return
        folder = str(Path(output_dir) / OPTIMIZER_FOLDER)
        _checkpoint.save_optimizer_distributed(self.model, self.optimizer.optimizer, folder)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        trainer: Any = super()
        if checkpoint is None or not is_split(self.model):
            trainer._load_optimizer_and_scheduler(checkpoint)
            return
        folder = str(Path(checkpoint) / OPTIMIZER_FOLDER)
        _checkpoint.load_optimizer_distributed(self.model, self.optimizer.optimizer, folder)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = super()
        if not is_split(self.model) or isinstance(self.model, PeftModel):
            trainer._load_from_checkpoint(resume_from_checkpoint, model)
        elif Path(self.model.name_or_path).resolve() != Path(resume_from_checkpoint).resolve():
            raise UserError(f"resume_from_checkpoint: load the split model from {resume_from_checkpoint}")
