# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint needs besides its weights to stand on the Hub."""

from .card import write_model_card


__all__ = ["write_model_card"]
