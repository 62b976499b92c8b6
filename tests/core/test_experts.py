"""These tests compare every implementation of the experts with a float64 loop, in outputs and gradients."""

import copy

import pytest
import torch

from modeling_moe import MoEForCausalLM, model_experts
from modeling_moe.modeling_moe import MoEExperts
from tests.builders import tiny_config


KINDS = {
    "gated": {},
    "gated-bias": {"mlp_bias": True},
    "plain": {"gated_experts": False},
    "two-layer-relu-bias": {"gated_experts": False, "mlp_bias": True, "hidden_act": "relu"},
}
# transformers' grouped_mm needs rows of a multiple of 16 bytes; ours serves any row
SHAPES = {"several": (9, 5, 3), "one token": (1, 5, 3), "one expert": (7, 1, 1), "all experts": (6, 4, 4)}


def experts_of(kind: str, implementation: str, num_experts=5, top_k=3, dtype=torch.float64) -> MoEExperts:
    config = tiny_config(
        num_experts=num_experts, num_experts_per_tok=top_k, experts_implementation=implementation, **KINDS[kind]
    )
    torch.manual_seed(1)
    module = MoEExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def by_hand(module: MoEExperts, tokens, index, weight):
    """Computes sum_k w_k f_{index_k}(x), token by token."""
    rows = []
    for x, chosen, weights in zip(tokens, index, weight, strict=True):
        total = torch.zeros_like(x)
        for expert, factor in zip(chosen.tolist(), weights, strict=True):
            if expert == module.num_experts:
                continue
            h = getattr(module, module.up_name)[expert] @ x
            if module.has_bias:
                h = h + getattr(module, f"{module.up_name}_bias")[expert]
            if module.has_gate:
                gate, up = h.chunk(2)
                h = module.act_fn(gate) * up
            else:
                h = module.act_fn(h)
            y = module.down_proj[expert] @ h
            total = total + factor * (y + module.down_proj_bias[expert] if module.has_bias else y)
        rows.append(total)
    return torch.stack(rows)


def random_inputs(tokens, num_experts, top_k, dtype=torch.float64):
    states = torch.randn(tokens, 32, dtype=dtype, requires_grad=True)
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)])
    weight = torch.rand(tokens, top_k, dtype=dtype, requires_grad=True)
    return states, index, weight


def outputs_and_gradients(function, module, states, index, weight, direction):
    output = function(states, index, weight)
    return output, torch.autograd.grad((output * direction).sum(), [states, weight, *module.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_float64(implementation, shape, kind):
    tokens, num_experts, top_k = SHAPES[shape]
    module = experts_of(kind, implementation, num_experts, top_k)
    inputs = random_inputs(tokens, num_experts, top_k)
    direction = torch.randn(tokens, 32, dtype=torch.float64)
    expected = outputs_and_gradients(lambda *x: by_hand(module, *x), module, *inputs, direction)
    got = outputs_and_gradients(module, module, *inputs, direction)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_mm(kind):
    module = experts_of(kind, "grouped_mm", dtype=torch.float32)
    inputs = random_inputs(9, 5, 3, torch.float32)
    direction = torch.randn(9, 32)
    expected = outputs_and_gradients(lambda *x: by_hand(module, *x), module, *inputs, direction)
    got = outputs_and_gradients(module, module, *inputs, direction)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_idle_expert_and_all_tokens_to_one(kind):
    module = experts_of(kind, "eager", top_k=1)
    states, _, weight = random_inputs(6, 5, 1)
    index = torch.full((6, 1), 2)
    direction = torch.randn(6, 32, dtype=torch.float64)
    expected = outputs_and_gradients(lambda *x: by_hand(module, *x), module, states, index, weight, direction)
    got = outputs_and_gradients(module, module, states, index, weight, direction)
    torch.testing.assert_close(got, expected)
    down_grad = dict(zip((name for name, _ in module.named_parameters()), got[1][2:], strict=True))["down_proj"]
    assert down_grad[2].any()
    assert not down_grad[[0, 1, 3, 4]].any()


def test_empty_slot_is_skipped():
    module = experts_of("gated", "eager")
    states, index, weight = random_inputs(4, 5, 3)
    index[1, 2], index[3] = 5, torch.tensor([5, 5, 5])
    direction = torch.randn(4, 32, dtype=torch.float64)
    expected = outputs_and_gradients(lambda *x: by_hand(module, *x), module, states, index, weight, direction)
    got = outputs_and_gradients(module, module, states, index, weight, direction)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert not got[0][3].any()
    assert not got[1][1][3].any()


def test_no_tokens():
    module = experts_of("gated", "eager", dtype=torch.float32)
    assert module(torch.zeros(0, 32), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3)).shape == (0, 32)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_bf16_stays_bf16(implementation):
    module = experts_of("gated-bias", implementation, dtype=torch.bfloat16)
    states, index, weight = random_inputs(5, 5, 3, torch.bfloat16)
    output = module(states, index, weight.float())
    assert output.dtype == torch.bfloat16
    reference = by_hand(copy.deepcopy(module).double(), states.double(), index, weight.double())
    torch.testing.assert_close(output.double(), reference, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"moe_latent_size": 16, "moe_intermediate_size": 24}, "grouped_mm"),
        ({"moe_latent_size": 30, "moe_intermediate_size": 24}, "eager"),
        ({"moe_latent_size": 16, "moe_intermediate_size": 28}, "eager"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_package_any_size_of_experts_is_computed(fields, chosen, dtype, monkeypatch):
    monkeypatch.setattr(model_experts, "ALL_EXPERTS_FUNCTIONS", {})
    model = MoEForCausalLM(tiny_config(**fields)).to(dtype).eval()
    assert model.config._experts_implementation == chosen
    ids = torch.arange(3, 21).view(2, 9)
    got = model(ids).logits
    model.set_experts_implementation("batched_mm")
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(got, model(ids).logits, atol=tolerance, rtol=tolerance)
