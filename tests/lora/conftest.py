# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Each test of LoRA starts with PEFT changed by `enable`, and leaves PEFT as it found it."""

import pytest

from modeling_moe import lora


@pytest.fixture(autouse=True)
def enabled():
    """Calls `enable`, and `disable` at the end."""
    lora.enable()
    yield
    lora.disable()
