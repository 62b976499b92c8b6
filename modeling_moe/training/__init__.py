# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning with transformers' `Trainer`, and evaluation of what came out.

Importing it gives each `Trainer` made after, TRL's included, a [`MoECallback`], which is all that it needs.
"""

from ..data.documents import DataArguments, load_and_pack
from ..data.packing import pack
from ..data.sources import load_documents
from ..evaluation.hf_metrics import BitsPerByte, RouterBalance
from ..evaluation.scoring import DomainScore, EvaluationArguments, evaluate_lm, score
from .arguments import FinetuneArguments, LoraArguments, ModelArguments
from .callbacks import MoECallback
from .finetuning import FinetuneResult, finetune, trained_parameters
from .freezing import FreezeExpertsCallback, FrozenExperts, freeze_experts
from .nan_stop import NanStopMixin, NonFiniteError
from .sharded import ShardedResumeMixin


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
