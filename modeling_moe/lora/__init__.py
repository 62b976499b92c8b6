# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""LoRA on expert tensors, through PEFT's own API and in its own files.

With this package imported, PEFT's `target_parameters` on experts that [`~modeling_moe.dispatch`] serves are low-rank
products on the tokens, in place of an updated copy of every expert's weight. PEFT is imported when it is used.

PEFT's other methods know no default layers of this model: name them, as in
`IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])`.
"""

from importlib import import_module
from typing import Any

from .imports import when_imported


def _install() -> None:
    from . import layers  # noqa: F401, teaches PEFT


when_imported("peft", _install)

_MODULES = {
    "MoELoraConfig": "config",
    "moe_lora_config": "config",
    "trainable_parameters": "config",
    "synchronize_adapters": "sharding",
    "quantize_experts": "quantization",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
