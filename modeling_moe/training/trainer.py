# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds the `Trainer` of a fine-tuning, which stops at NaN and resumes exactly."""

from statistics import fmean
from typing import Any

from torch import nn

from ..lora import full_shape
from ..monitoring import active_share
from ..utils.errors import UserError
from .nan_stop import NanStopMixin
from .resuming import WholeCheckpointsTrainer
from .sharded import ShardedResumeMixin
from .transformers_losses import without_router_logits


class FinetuneTrainer(ShardedResumeMixin, NanStopMixin, WholeCheckpointsTrainer):
    """transformers' `Trainer` that stops at NaN, and resumes from complete checkpoints only, of split models too."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counts the experts that a token is sent to; transformers counts all experts."""
        return round(super().floating_point_ops(inputs) * active_share(self.model))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the parameters that weight decay shrinks: neither norms, biases nor other parameters of one dimension.

        transformers finds norms and biases by their names, which learned factors such as a router's `expert_scale` lack.
        """
        vectors = {name for name, parameter in model.named_parameters() if len(full_shape(parameter)) < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]

    def create_optimizer(self, *args, **kwargs):
        """Makes the optimizer, and raises UserError if that fails."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, TypeError, ValueError) as error:
            name = getattr(self.args.optim, "value", self.args.optim)
            raise UserError(f"optim {name} cannot be used: {error}") from error

    def create_scheduler(self, *args, **kwargs):
        """Makes the learning-rate schedule, and raises UserError if that fails."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except (TypeError, ValueError) as error:
            name = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
            raise UserError(
                f"lr_scheduler_type {name} cannot be used: {error}: correct lr_scheduler_kwargs"
            ) from error

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluates each domain, and adds the mean of the domains' losses, which chooses the best checkpoint.

        The loss is the cross entropy, also for a model whose configuration asks transformers for a balance loss.
        """
        model: Any = self.model
        with without_router_logits(model):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        domains = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(domains, dict):
            metrics[f"{metric_key_prefix}_loss"] = fmean(
                metrics[f"{metric_key_prefix}_{name}_loss"] for name in domains
            )
        return metrics
