"""The switches of a sparse block are compared with the blocks of transformers that they come from."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from modeling_moe.modeling_moe import MoEBlock
from tests.builders import tiny_config


def randomised(module: nn.Module) -> nn.Module:
    """Fills all parameters and selection biases with random numbers and returns the module in float64 and evaluation."""
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.normal_(std=0.5)
            if name.endswith("scale"):
                tensor.add_(1.0)
    return module


def block_of(**fields) -> MoEBlock:
    return MoEBlock(tiny_config(hidden_size=8, experts_implementation="eager", **fields)).double().eval()


def agree(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-10) -> None:
    """Compares outputs and gradients of two blocks for the same tokens."""
    outputs, gradients = [], []
    direction = torch.randn(2, 7, 8, dtype=torch.float64)
    states = torch.randn(2, 7, 8, dtype=torch.float64)
    for block in (ours, theirs):
        leaf = states.clone().requires_grad_()
        output = block(leaf)
        output = output[0] if isinstance(output, tuple) else output
        (output * direction).sum().backward()
        outputs.append(output.detach())
        gradients.append(leaf.grad)
    for mine, other in (outputs, gradients):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("strategy", ["sum", "average"])
def test_routed_and_shared_experts_are_combined_as_in_cohere2_moe(strategy):
    from transformers.models.cohere2_moe.modeling_cohere2_moe import Cohere2MoeSparseMoeBlock

    config = CONFIG_MAPPING["cohere2_moe"](
        hidden_size=8,
        intermediate_size=24,
        num_experts=5,
        num_experts_per_tok=3,
        num_shared_experts=2,
        shared_expert_combination_strategy=strategy,
    )
    config._experts_implementation = "eager"
    theirs = randomised(Cohere2MoeSparseMoeBlock(config))
    ours = block_of(num_shared_experts=2, shared_expert_combination_strategy=strategy)
    ours.load_state_dict(theirs.state_dict())
    agree(ours, theirs, 1e-5)  # their weights are fp32
