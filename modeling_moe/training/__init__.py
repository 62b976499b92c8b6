# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package fine-tunes models with transformers' `Trainer`.

    import modeling_moe.training

    modeling_moe.training.enable()

[`enable`] gives each `Trainer` that is made from then on a [`MoECallback`], TRL's trainers included. A `Trainer` that
exists already does not change. [`disable`] ends this. [`finetune`] and the command `finetune` use the callback without
`enable`. To use it in one `Trainer` only, pass `callbacks=[MoECallback()]`.

Importing this package changes nothing. A `Trainer` without the callback:

- trains a model of this package with the router losses, which are part of the model's loss. The routers' controllers
  (selection biases, thresholds) do not move, and the model warns of that after the first optimizer step. A loop that
  calls `model.update_routers()` after each `optimizer.step()` needs no callback;
- adds the router losses of all micro-batches where they attach themselves to the hidden states, because the trainer
  computes its loss without the model's head (TRL, label smoothing): with N accumulated micro-batches they weigh N
  times as much;
- resumes a model of this package exactly, and loads its best checkpoint exactly;
- trains a model of transformers as transformers does, without a balance loss unless `output_router_logits` is set, and with
  selection biases that never move. [`balance`] changes both, and needs the callback to count micro-batches and labels;
- resumes a model of transformers as transformers does: `Trainer` loads neither the experts nor the renamed routers of
  most such models from a checkpoint, and only logs that keys are missing.
"""

from ..data import DataArguments
from .adaptation import RouterAdaptation, adapt_router, meta_gradient, router_parameters
from .arguments import BalanceArguments, FinetuneArguments, LoraArguments, MetaArguments, ModelArguments
from .balance import Balance, BalanceSettings, balance, balances_of
from .callbacks import CastOnceCallback, MoECallback, disable, enable, is_enabled
from .collapse_stop import CollapseError, CollapseStop, load_entropy
from .finetuning import FinetuneResult, finetune
from .freezing import FreezeExpertsCallback, FrozenExperts, freeze_experts
from .load_rates import LoadRates, scale_by_load
from .long_runs import LongRunArguments
from .meta_training import MetaTrainingMixin
from .muon import MoEMuon, moe_muon, orthogonalise
from .nan_stop import NanStopMixin, NonFiniteError
from .preparing import trained_parameters
from .roles import parameter_groups, parameter_roles
from .router_average import RouterAverage, RouterAverageMixin
from .sampling import SampleCallback
from .sharded import ShardedResumeMixin


__all__ = [
    "Balance",
    "BalanceArguments",
    "BalanceSettings",
    "CastOnceCallback",
    "CollapseError",
    "CollapseStop",
    "DataArguments",
    "FinetuneArguments",
    "FinetuneResult",
    "FreezeExpertsCallback",
    "FrozenExperts",
    "LoadRates",
    "LongRunArguments",
    "LoraArguments",
    "MetaArguments",
    "MetaTrainingMixin",
    "MoECallback",
    "MoEMuon",
    "ModelArguments",
    "NanStopMixin",
    "NonFiniteError",
    "RouterAverage",
    "RouterAverageMixin",
    "SampleCallback",
    "RouterAdaptation",
    "ShardedResumeMixin",
    "adapt_router",
    "balance",
    "balances_of",
    "disable",
    "enable",
    "finetune",
    "freeze_experts",
    "is_enabled",
    "load_entropy",
    "moe_muon",
    "orthogonalise",
    "parameter_groups",
    "parameter_roles",
    "scale_by_load",
    "meta_gradient",
    "router_parameters",
    "trained_parameters",
]
