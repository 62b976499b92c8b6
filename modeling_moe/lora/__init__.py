# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""LoRA on expert tensors, through PEFT's own API and in its own files.

With this package imported, PEFT's `target_parameters` on experts that [`~modeling_moe.dispatch`] serves are low-rank
products on the tokens, in place of an updated copy of every expert's weight. PEFT is imported when it is used.
"""

from typing import Any

from .imports import when_imported


def _install() -> None:
    from . import layers

    layers.install()


when_imported("peft", _install)

__all__ = ["MoELoraConfig", "moe_lora_config", "quantize_experts", "trainable_parameters"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import config, quantization

    return getattr(quantization if name == "quantize_experts" else config, name)
