# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts of a model can stay in the checkpoint or in host memory, and are copied to the device when they are used."""

from .loading import load_without_experts


__all__ = ["load_without_experts"]
