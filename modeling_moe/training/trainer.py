# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds the `Trainer` of a fine-tuning, which stops at NaN and resumes exactly."""

from statistics import fmean
from typing import Any

from torch import nn

from ..monitoring import active_share
from ..utils.errors import UserError
from .long_runs import LOAD, LongRunArguments, long_run_optimizer, set_roles
from .meta_training import MetaTrainingMixin
from .nan_stop import NanStopMixin
from .resuming import WholeCheckpointsTrainer
from .roles import decayed_names
from .router_average import RouterAverageMixin
from .sharded import ShardedResumeMixin
from .transformers_losses import without_router_logits


class FinetuneTrainer(
    RouterAverageMixin, ShardedResumeMixin, NanStopMixin, MetaTrainingMixin, WholeCheckpointsTrainer
):
    """transformers' `Trainer` that stops at NaN, and resumes from complete checkpoints only, of split models too.

    Attributes:
        long_run: learning rates by role, and Muon.
    """

    long_run = LongRunArguments()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counts the experts that a token is sent to; transformers counts all experts."""
        return round(super().floating_point_ops(inputs) * active_share(self.model))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the parameters that weight decay shrinks, chosen by [`~modeling_moe.training.roles.decayed_names`]."""
        return sorted(decayed_names(model))

    def create_optimizer(self, *args, **kwargs):
        """Makes the optimizer of a long run, and raises UserError if that fails."""
        model: Any = args[0] if args else kwargs.get("model") or self.model
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        self._refuse_flattened()
        self.optimizer = long_run_optimizer(model, self.args, self.long_run)
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (ImportError, TypeError, ValueError) as error:
            name = getattr(self.args.optim, "value", self.args.optim)
            raise UserError(f"optim {name} cannot be used: {error}") from error
        set_roles(model, optimizer, self.args, self.long_run)
        return optimizer

    def _refuse_flattened(self) -> None:
        """Refuses Muon, groups by role and averages where FSDP1 or DeepSpeed flattens the weights, and rates by load where any splits them."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        flattened = self.is_deepspeed_enabled or (plugin is not None and getattr(plugin, "fsdp_version", 1) == 1)
        for name in ("muon", "role_rates", "role_decays", "router_average"):
            if flattened and getattr(self.long_run, name):
                raise UserError(f"{name} cannot be used with FSDP1 or DeepSpeed, which flatten the weights: use FSDP2")
        if self.long_run.rates()[0].get("expert") == LOAD and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError(
                "role_rates expert=load needs whole experts, which FSDP and DeepSpeed split: train with DDP"
            )

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
