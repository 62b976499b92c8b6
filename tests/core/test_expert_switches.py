"""The switches of a sparse block are compared with the blocks of transformers that they come from."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from modeling_moe.model_mlp import MoEMLP
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import RoutingContext
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


def test_latent_experts_equal_nemotron_h():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    config = CONFIG_MAPPING["nemotron_h"](
        hidden_size=8,
        moe_latent_size=6,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=20,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        mlp_bias=False,
        mlp_hidden_act="relu2",
    )
    config._experts_implementation = "eager"
    theirs = randomised(NemotronHMoE(config))
    ours = block_of(
        moe_latent_size=6,
        gated_mlp=False,
        hidden_act="relu2",
        num_shared_experts=1,
        shared_expert_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        router_selection_bias=True,
    )
    ours.load_state_dict(theirs.state_dict())
    agree(ours, theirs, 1e-5)  # their routing is fp32


@pytest.mark.parametrize(
    "fields", [{}, {"router_type": "lory"}, {"router_gradient": "dense"}, {"capacity_factor": 0.5}]
)
def test_latent_experts_are_projections_around_experts_that_read_the_latent(fields):
    """The weighted sum of experts of the latent is written out, with router and capacity as the block has them."""
    block = block_of(moe_latent_size=6, mlp_bias=True, **fields).train()
    block.gate.init_weights(0.5)
    randomised(block).train()
    states = torch.randn(2, 7, 8, dtype=torch.float64)
    context = RoutingContext(2)
    routing = block.capacity(block.gate(states.view(14, 8), context), context, True)
    latent = torch.nn.functional.linear(states.view(14, 8), block.fc1_latent_proj.weight, block.fc1_latent_proj.bias)
    mixed = block.mix(block.experts, latent, routing, context, block.config)
    expected = mixed @ block.fc2_latent_proj.weight.T + block.fc2_latent_proj.bias
    assert block.experts.down_proj.shape == (5, 6, 24)
    torch.testing.assert_close(block(states, context)[0].view(14, 8), expected)


def test_copy_experts_and_latents_exclude_each_other():
    with pytest.raises(ValueError, match=r"num_copy_experts .* moe_latent_size"):
        tiny_config(num_copy_experts=1, moe_latent_size=6)


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_clamped_networks_equal_deepseek_v4(act):
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4MLP

    config = CONFIG_MAPPING["deepseek_v4"](
        hidden_size=8,
        intermediate_size=24,
        moe_intermediate_size=24,
        n_routed_experts=5,
        swiglu_limit=0.7,
        hidden_act=act,
    )
    config._experts_implementation, config.intermediate_size = "eager", 24
    theirs = randomised(DeepseekV4MLP(config))
    limits = {"swiglu_limit": 0.7, "swiglu_alpha": None, "dense_swiglu_limit": 0.7, "hidden_act": act}
    block = block_of(num_shared_experts=1, **limits)
    block.shared_experts.load_state_dict(theirs.state_dict())
    agree(block.shared_experts, theirs)
    experts = randomised(DeepseekV4Experts(config))
    block.experts.load_state_dict(experts.state_dict())
    tokens, index = torch.randn(9, 8, dtype=torch.float64), torch.randint(0, 5, (9, 2))
    weight = torch.rand(9, 2, dtype=torch.float64)
    torch.testing.assert_close(block.experts(tokens, index, weight), experts(tokens, index, weight))


def test_a_dense_network_clamps_gate_and_up_by_hand():
    network = MoEMLP(tiny_config(hidden_size=1, dense_swiglu_limit=2.0), 1, gated=True).double()
    with torch.no_grad():
        for weight, value in zip(network.parameters(), (3.0, -4.0, 1.0), strict=True):
            weight.fill_(value)
    silu = torch.nn.functional.silu
    states = torch.tensor([[1.0], [-1.0], [0.25]], dtype=torch.float64)
    gates, ups = torch.tensor([[2.0], [-3.0], [0.75]]).double(), torch.tensor([[-2.0], [2.0], [-1.0]]).double()
    torch.testing.assert_close(network(states), silu(gates) * ups)
