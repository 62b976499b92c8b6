# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package lets servers find and run this package's models: vLLM by a plugin, `transformers serve` by `moe serve`."""

from .vllm_limits import has_fused_experts, refuse_vllm


__all__ = ["has_fused_experts", "refuse_vllm"]
