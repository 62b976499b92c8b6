"""These tests compare Muon on stacked experts with torch's Muon on one parameter for each matrix."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

from modeling_moe.lora import moe_lora_config
from modeling_moe.training import MoEMuon, freeze_experts, moe_muon, orthogonalise
from modeling_moe.training.muon import LAYOUTS, matrix_layouts
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_model
from tests.training.families import tiny


COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)


def gate_and_up(model_type: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Returns the gate (I, H) and the up projection (I, H) of an expert, from its slice of `gate_up_proj`."""
    if model_type == "gpt_oss":  # (H, 2I), interleaved
        return [weight[:, 0::2].T, weight[:, 1::2].T]
    if model_type == "aria_text":  # (H, 2I)
        return list(weight.T.chunk(2))
    return list(weight.chunk(2))  # (2I, H)


def matrices(model_type: str, name: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Returns the matrices (outputs, inputs) of a layer's experts."""
    if name == "gate_up_proj":
        return [matrix for expert in weight for matrix in gate_and_up(model_type, expert)]
    return [expert.T if model_type in ("gpt_oss", "aria_text") else expert for expert in weight]


def loss(model, seed: int) -> torch.Tensor:
    """Returns the loss of a batch."""
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(seed))
    return model(ids, labels=ids).loss


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "aria_text", "nemotron_h"])
def test_each_experts_matrix_equals_torchs_muon_on_its_own(model_type, adjust):
    """Three steps with decay and momentum, bit for bit: concatenated, interleaved, transposed, and without a gate."""
    model = tiny(model_type)
    experts = [module for module in model.modules() if "has_gate" in vars(module)]
    stacked = [
        (name, weight)
        for module in experts
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    ]
    alone = [
        [
            nn.Parameter(matrix.detach().clone(memory_format=torch.contiguous_format))
            for matrix in matrices(model_type, name, weight)
        ]
        for name, weight in stacked
    ]
    oracle = Muon([p for ps in alone for p in ps], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    optimizer = moe_muon(model, 0.02, 0.1, adjust_lr_fn=adjust)
    first = [weight.detach().clone() for _, weight in stacked]
    for seed in range(3):
        loss(model, seed).backward()
        for (name, weight), parameters in zip(stacked, alone, strict=True):
            for parameter, gradient in zip(parameters, matrices(model_type, name, weight.grad), strict=True):
                parameter.grad = gradient.detach().clone(memory_format=torch.contiguous_format)
        optimizer.step()
        optimizer.zero_grad()
        oracle.step()
    for (name, weight), parameters, before in zip(stacked, alone, first, strict=True):
        found = torch.stack(matrices(model_type, name, weight.detach()))
        assert torch.equal(found, torch.stack([parameter.detach() for parameter in parameters]))
        assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    "shape", [(64, 12, 20), (64, 20, 12), (7, 13, 13), (1, 3, 40), (3, 2, 8, 5), (6, 9), (0, 4, 5)]
)
def test_the_batched_iteration_equals_torchs_bit_for_bit(shape):
    torch.manual_seed(0)
    stack = torch.randn(shape, dtype=torch.float64)
    alone = [
        _zeropower_via_newtonschulz(matrix.clone(), COEFFICIENTS, 5, EPS) for matrix in stack.view(-1, *shape[-2:])
    ]
    expected = torch.stack(alone) if alone else torch.empty(0, *shape[-2:], dtype=torch.bfloat16)
    assert torch.equal(orthogonalise(stack), expected.view(shape))


def test_the_iteration_against_float64():
    """Each matrix has the singular vectors of its own, and singular values in [0.6, 1.3]; the stack as one matrix has not."""
    torch.manual_seed(0)
    stack = torch.randn(8, 24, 40, dtype=torch.float64)
    stack[0] *= 1000.0  # would hide the others in one norm
    left, values, right = torch.linalg.svd(stack, full_matrices=False)
    a, b, c = COEFFICIENTS
    values = values / stack.flatten(1).norm(dim=1)[:, None]
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert 0.6 < values.min() < values.max() < 1.3
    expected = left @ torch.diag_embed(values) @ right
    # bfloat16 has 8 bits
    torch.testing.assert_close(orthogonalise(stack).double(), expected, rtol=0, atol=0.03)
    reshaped = orthogonalise(stack.view(-1, 40)).view(stack.shape).double()
    assert (reshaped - expected).abs().max() > 0.2


def test_the_momentum_of_weights_in_16_bits_is_the_average_of_the_gradients():
    """`torch.optim.Muon(nesterov=False)` divides a momentum in bfloat16 by its norm, in place."""
    model = tiny("mixtral").bfloat16()
    optimizer = moe_muon(model, 0.02, momentum=0.5)
    weights = [weight for group in optimizer.param_groups if group["layout"] for weight in group["params"]]
    averages = [torch.zeros_like(weight) for weight in weights]
    for seed in range(2):
        loss(model, seed).backward()
        gradients = [weight.grad.clone() for weight in weights]
        optimizer.step()
        for weight, average, gradient in zip(weights, averages, gradients, strict=True):
            average.lerp_(gradient, 0.5)
            assert torch.equal(optimizer.state[weight]["momentum_buffer"], average)
            assert torch.equal(weight.grad, gradient)
        optimizer.zero_grad()
    stack = torch.randn(3, 4, 6).bfloat16()
    kept = stack.clone()
    orthogonalise(stack)
    assert torch.equal(stack, kept)


def test_what_is_no_matrix_is_trained_by_adamw_and_equals_torchs():
    model = tiny("qwen2_moe")
    twin = copy.deepcopy(model)
    optimizer = moe_muon(model, 1e-2, 0.1, betas=(0.8, 0.9))
    by_adamw = {id(p) for group in optimizer.param_groups if group["layout"] is None for p in group["params"]}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in by_adamw]
    kinds = (
        "embed_tokens.weight",
        "lm_head.weight",
        "mlp.gate.weight",
        "shared_expert_gate.weight",
        "norm.weight",
        ".bias",
    )
    assert names == [name for name, _ in model.named_parameters() if name.endswith(kinds)]
    parameters = dict(twin.named_parameters())
    decayed = [parameters[name] for name in names if parameters[name].dim() > 1]
    others = [parameters[name] for name in names if parameters[name].dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    oracle = AdamW(groups, lr=1e-2, betas=(0.8, 0.9))
    for seed in range(3):
        loss(model, seed).backward()
        for name, parameter in model.named_parameters():
            parameters[name].grad = parameter.grad.clone()
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
    assert all(torch.equal(model.get_parameter(name), parameters[name]) for name in names)


def test_a_linear_layer_of_two_matrices_is_split():
    model = tiny("minimax_m3_vl_text")
    layouts, weights = matrix_layouts(model), dict(model.named_parameters())
    fused = [name for name in weights if name.endswith("gate_up_proj.weight")]
    assert fused
    assert {layouts[id(weights[name])] for name in fused} == {"gate_up"}
    torch.manual_seed(0)
    weight = torch.randn(12, 5)
    assert torch.equal(LAYOUTS["gate_up"](weight), torch.stack([weight[:6], weight[6:]]))


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    def step(model, optimizer, seed):
        loss(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = tiny("mixtral")
    optimizer = moe_muon(model, 1e-2, rates={"router": 0.5})
    for seed in range(2):
        step(model, optimizer, seed)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = tiny("mixtral")
    other.load_state_dict(weights)
    resumed = moe_muon(other, 1e-2, rates={"router": 0.5})
    resumed.load_state_dict(state)
    for seed in range(2, 4):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


def test_frozen_experts_stay():
    model = tiny_model()
    frozen = freeze_experts(model, [0, 3])
    optimizer = moe_muon(model, 1e-2)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    before = experts.detach().clone()
    loss(model, 0).backward()
    optimizer.step()
    frozen.restore()
    changed = [not torch.equal(experts[e], before[e]) for e in range(5)]
    assert changed == [False, True, True, False, True]


def test_parameters_without_gradient_stay():
    model = tiny("mixtral")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moe_muon(model, 1e-2).step()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_refusals():
    model = tiny_model()
    with pytest.raises(UserError, match="Muon cannot train an adapter"):
        moe_muon(get_peft_model(model, moe_lora_config(model, r=2)), 1e-3)
    with pytest.raises(UserError, match="which FSDP1 and DeepSpeed flatten: use FSDP2 or DDP"):
        MoEMuon([{"params": [nn.Parameter(torch.ones(12))], "layout": "experts"}])
