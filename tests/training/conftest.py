"""Each test of training starts with `Trainer` changed by `enable`, and leaves it as it was."""

import pytest

import modeling_moe.training


@pytest.fixture(autouse=True)
def enabled():
    """Gives each `Trainer` of a test a MoECallback."""
    modeling_moe.training.enable()
    yield
    modeling_moe.training.disable()
