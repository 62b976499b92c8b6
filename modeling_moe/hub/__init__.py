# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package writes model cards and publishes checkpoints on the Hugging Face Hub."""

from .card import write_model_card
from .pictures import take_pictures
from .push import Published, check_without_package, push_folder


__all__ = ["Published", "check_without_package", "push_folder", "take_pictures", "write_model_card"]
