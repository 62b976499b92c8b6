# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint needs besides its weights to stand on the Hub, and the way there."""

from .card import write_model_card
from .push import Published, check_without_package, push_folder


__all__ = ["Published", "check_without_package", "push_folder", "write_model_card"]
