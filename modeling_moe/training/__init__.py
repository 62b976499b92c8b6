# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning with transformers' `Trainer`, and evaluation of what came out.

Importing it gives each `Trainer` made after, TRL's included, a [`MoECallback`], which is all that it needs.
"""

from .arguments import FinetuneArguments, LoraArguments, ModelArguments
from .callbacks import MoECallback
from .data import DataArguments, load_and_pack
from .evaluation import DomainScore, EvaluationArguments, evaluate_lm, score
from .finetuning import FinetuneResult, finetune, trained_parameters
from .freezing import FreezeExpertsCallback, FrozenExperts, freeze_experts
from .measures import BitsPerByte, RouterBalance
from .nan_stop import NanStopMixin, NonFiniteError
from .packing import pack
from .sharded import ShardedResumeMixin
from .sources import load_documents


__all__ = [
    "MoECallback",
    "DataArguments",
    "load_documents",
    "load_and_pack",
    "pack",
    "BitsPerByte",
    "RouterBalance",
    "DomainScore",
    "EvaluationArguments",
    "evaluate_lm",
    "score",
    "FinetuneArguments",
    "FinetuneResult",
    "LoraArguments",
    "ModelArguments",
    "finetune",
    "trained_parameters",
    "NanStopMixin",
    "NonFiniteError",
    "ShardedResumeMixin",
    "FreezeExpertsCallback",
    "FrozenExperts",
    "freeze_experts",
]
