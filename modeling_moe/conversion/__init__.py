# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package converts transformers' dense and sparse checkpoints to MoE checkpoints with equal logits, and back."""

from .convert import Conversion, ConversionPlan, convert_checkpoint, plan_conversion
from .families.catalogue import FAMILIES, SPARSE_FAMILIES, fields_without_effect, moe_config, source_config
from .families.dense import DENSE_FAMILIES
from .families.wrappers import WRAPPERS, text_source, towers
from .importing import import_state, load_state, tensors_on_disk, to_moe
from .opening import Checkpoint, open_checkpoint
from .saving import result_folder, save_checkpoint
from .targets.catalogue import AUTO, TARGETS, choose_target, exact_targets
from .targets.servers import SERVERS, SILU, Server, Verdict, servers, verdicts
from .verification import Verification, verification_ids, verify


__all__ = [
    "AUTO",
    "Checkpoint",
    "Conversion",
    "ConversionPlan",
    "DENSE_FAMILIES",
    "FAMILIES",
    "SPARSE_FAMILIES",
    "SERVERS",
    "SILU",
    "Server",
    "TARGETS",
    "Verdict",
    "Verification",
    "WRAPPERS",
    "choose_target",
    "convert_checkpoint",
    "exact_targets",
    "fields_without_effect",
    "import_state",
    "load_state",
    "moe_config",
    "open_checkpoint",
    "plan_conversion",
    "result_folder",
    "save_checkpoint",
    "servers",
    "source_config",
    "tensors_on_disk",
    "text_source",
    "to_moe",
    "towers",
    "verdicts",
    "verification_ids",
    "verify",
]
