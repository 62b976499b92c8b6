# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module saves and resumes training of a model that transformers' `DistributedConfig` has split over processes."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ..utils.errors import UserError


try:
    _checkpoint = import_module("transformers.distributed.checkpoint")
except ImportError:  # older releases of transformers have these functions in another module
    _checkpoint = import_module("transformers.distributed.utils")
OPTIMIZER_FOLDER = "optimizer"


def is_split(model: object) -> bool:
    """Returns whether `from_pretrained(..., distributed_config=...)` has split the model, with or without an adapter."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


class ShardedResumeMixin(Trainer):
    """Saves the optimizer's state in checkpoints of a split model, and resumes it; put it before another `Trainer`
    class.

    transformers saves the gathered weights of such a model and refuses to save the rest. Here each process writes its
    part of the optimizer's state (`torch.distributed.checkpoint`). To resume, load the weights from the checkpoint by
    `from_pretrained`; PEFT loads adapters.

    Raises:
        UserError: in resuming, if the model was not loaded from the checkpoint.
    """

    def __init__(self, model: Any = None, args: Any = None, *others, **kwargs):
        if args is None or not is_split(model):
            super().__init__(model, args, *others, **kwargs)
            return
        # otherwise transformers refuses to save checkpoints of a split model
        only_model, args.save_only_model = args.save_only_model, True
        try:
            super().__init__(model, args, *others, **kwargs)
        finally:
            args.save_only_model = only_model

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Makes the optimizer as `Trainer` does, without empty groups of parameters for a split model."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_split(self.model):
            # torch.distributed.checkpoint reads the first parameter of each group
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_split(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = str(Path(output_dir) / OPTIMIZER_FOLDER)
        _checkpoint.save_optimizer_distributed(self.model, self._bare_optimizer(), folder)
        if self.args.should_save:
            assert self.lr_scheduler is not None  # `Trainer` makes it before it saves
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_split(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = str(Path(checkpoint) / OPTIMIZER_FOLDER)
        _checkpoint.load_optimizer_distributed(self.model, self._bare_optimizer(), folder)
        assert self.lr_scheduler is not None  # `Trainer` makes it before it loads
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer inside Accelerate's wrapper."""
        assert isinstance(self.optimizer, AcceleratedOptimizer)  # `Trainer` prepares it before it saves or loads
        return self.optimizer.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_split(self.model) or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif Path(getattr(self.model, "name_or_path", "")).resolve() != Path(resume_from_checkpoint).resolve():
            raise UserError(f"resume_from_checkpoint: load the split model from {resume_from_checkpoint}")
