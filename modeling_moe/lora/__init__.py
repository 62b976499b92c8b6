# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package trains LoRA adapters on expert matrices through PEFT's own API, in PEFT's own files.

    import modeling_moe.lora

    modeling_moe.lora.enable()

[`enable`] changes PEFT in this process: its layers on the matrices of experts multiply tokens by the low-rank factors,
where PEFT alone builds the updated matrix of every expert in each forward pass. [`disable`] undoes the change. These
functions call `enable` themselves: [`moe_lora_config`], [`MoELoraConfig`], [`quantize_experts`] and [`apply_adapter`],
and so do loading a model in 4 bits ([`Experts4bitConfig`]) and the commands `finetune` and `merge_adapter`. Call it
yourself before you use PEFT's own `LoraConfig` or `PeftModel.from_pretrained`; models that PEFT has wrapped earlier change
too.

Importing this package changes nothing but that transformers learns the name of the 4-bit format. Without `enable`:

- PEFT's `LoraConfig(target_parameters=...)` on the experts of this package's model gives correct outputs, gradients
  and adapter files. PEFT's own path computes them: slower, and with a gradient as large as the experts' matrices.
- PEFT treats models of other packages as if this package were not installed.
- PEFT loads every adapter that was trained here, since the files are PEFT's own.
- Dropout on experts, experts in 4 bits, and adapters on a model that `DistributedConfig` has split need `enable`.

`enable` leaves the `experts_implementation` of a model of transformers unchanged. Where it is `"grouped_mm"`, experts with
an adapter run by `"moe"` during their forward pass, and at no other time. `unload`, `merge_and_unload`,
`delete_adapter` and `disable_adapter` therefore leave the model with the implementation that it had.

PEFT knows no default target modules for this package's model, so its other methods need names, such as
`IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])`.
"""

from .config import MoELoraConfig, moe_lora_config, trainable_parameters
from .enabling import disable, enable, is_enabled, peft_alone
from .export_check import Comparison
from .exporting import ExportAdapterArguments, export_adapter
from .four_bits import dequantize
from .holding import is_in_4bit, shown_whole
from .merging import MergeArguments, apply_adapter, merge_adapter
from .quantization import quantize_experts
from .quantizer import COMPANIONS, Experts4bitConfig, state_of
from .sharding import full_shape, synchronize_adapters


__all__ = [
    "COMPANIONS",
    "Comparison",
    "Experts4bitConfig",
    "ExportAdapterArguments",
    "MergeArguments",
    "MoELoraConfig",
    "apply_adapter",
    "dequantize",
    "disable",
    "enable",
    "export_adapter",
    "full_shape",
    "is_enabled",
    "is_in_4bit",
    "merge_adapter",
    "moe_lora_config",
    "peft_alone",
    "quantize_experts",
    "shown_whole",
    "state_of",
    "synchronize_adapters",
    "trainable_parameters",
]
