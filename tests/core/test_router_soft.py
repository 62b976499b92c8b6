"""These tests compare Soft MoE and Lory with the papers' equations, written out in float64."""

import pytest
import torch
from transformers import DynamicCache

from modeling_moe import MoEForCausalLM
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import RoutingContext
from tests.builders import eager_block, tiny_config


MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 11])
# norms and rotary embedding compute in fp32 also in a float64 model
FP32 = {"rtol": 1e-5, "atol": 1e-5}
SEGMENTS = {"router_type": "lory", "segment_length": 3}


def network(up: torch.Tensor, down: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    gate, up = (states @ up.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def soft_moe(block: MoEBlock, x: torch.Tensor, slots: int) -> torch.Tensor:
    """Computes equations 1-3 and section 2.3 of arXiv:2308.00951 for one sequence (S, H)."""
    phi = block.gate.weight.view(5, slots, -1)
    normed = x / x.pow(2).sum(-1, keepdim=True).sqrt()
    logits = torch.einsum("sh,eph->sep", normed, phi / phi.pow(2).sum(-1, keepdim=True).sqrt()) * block.gate.scale
    dispatch = logits.exp() / logits.exp().sum(dim=0)
    combine = logits.exp() / logits.exp().sum(dim=(1, 2), keepdim=True)
    inputs = torch.einsum("sep,sh->eph", dispatch, x)
    weights = zip(block.experts.gate_up_proj, block.experts.down_proj, inputs, strict=True)
    return torch.einsum("sep,eph->sh", combine, torch.stack([network(*each) for each in weights]))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
@pytest.mark.parametrize("slots", [1, 2])
def test_soft_against_the_paper(slots, mask):
    block = eager_block(router_type="soft_moe", allow_noncausal=True, slots_per_expert=slots)
    torch.nn.init.constant_(block.gate.scale, 3.0)
    states = torch.randn(2, 11, 32).double()
    output = block(states, RoutingContext(2, None if mask is None else mask.flatten()))[0]
    for row in range(2):
        real = slice(None) if mask is None else mask[row] > 0
        torch.testing.assert_close(output[row, real], soft_moe(block, states[row, real], slots))


@pytest.mark.parametrize("slots", [1, 2])
def test_soft_gradients_against_the_paper(slots):
    block = eager_block(router_type="soft_moe", allow_noncausal=True, slots_per_expert=slots)
    states, factor = torch.randn(2, 11, 32).double(), torch.randn(2, 11, 32).double()
    expected = torch.stack([soft_moe(block, row, slots) for row in states])
    gradients = [
        torch.autograd.grad((factor * y).sum(), list(block.parameters())) for y in (block(states)[0], expected)
    ]
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 1e-5 for gradient in gradients[0])


def test_soft_routing_tells_the_experts_shares():
    block = eager_block(router_type="soft_moe", allow_noncausal=True, slots_per_expert=2)
    routing = block.gate(torch.randn(6, 32).double(), RoutingContext(1))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(6).double())
    torch.testing.assert_close(routing.logits.softmax(-1), routing.probs)
    torch.testing.assert_close(routing.weight, routing.probs)


def test_soft_is_refused_unless_noncausal_is_meant():
    with pytest.raises(ValueError, match="must not see: set allow_noncausal=True"):
        tiny_config(router_type="soft_moe")


def lory(block: MoEBlock, x: torch.Tensor, length: int = 3) -> torch.Tensor:
    """Computes section 3.2 of arXiv:2405.03133 for one sequence (S, H); the first segment mixes all experts evenly."""
    output = []
    for start in range(0, len(x), length):
        gate = torch.full((5,), 1 / 5).double()
        if start > 0:
            gate = (block.gate.weight @ (sum(x[start - length : start]) / length)).softmax(-1)
        up = sum(g * expert for g, expert in zip(gate, block.experts.gate_up_proj, strict=True))
        down = sum(g * expert for g, expert in zip(gate, block.experts.down_proj, strict=True))
        output.append(network(up, down, x[start : start + length]))
    return torch.cat(output)


@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["all", "left padding", "right padding"])
def test_segments_against_the_paper(mask):
    block = eager_block(**SEGMENTS)
    states = torch.randn(2, 11, 32).double()
    output = block(states, RoutingContext(2, None if mask is None else mask.flatten()))[0]
    for row in range(2):
        real = slice(None) if mask is None else mask[row] > 0
        torch.testing.assert_close(output[row, real], lory(block, states[row, real]))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "left padding"])
def test_segment_gradients_against_the_paper(mask):
    block = eager_block(**SEGMENTS).train()
    states = torch.randn(2, 11, 32).double().requires_grad_()
    real = torch.ones(2, 11, dtype=torch.bool) if mask is None else mask > 0
    factor = torch.randn(2, 11, 32).double() * real[..., None]
    output = block(states, RoutingContext(2, None if mask is None else mask.flatten()))[0]
    expected = sum((factor[row, real[row]] * lory(block, states[row, real[row]])).sum() for row in range(2))
    wanted = [states, *block.parameters()]
    gradients = [torch.autograd.grad(value, wanted) for value in ((factor * output).sum(), expected)]
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients[0])


def test_a_segment_is_gated_by_the_one_before_alone():
    block = eager_block(**SEGMENTS)
    states = torch.randn(9, 32).double()
    gates = block.gate(states).weight
    torch.testing.assert_close(gates[:3], torch.full((3, 5), 1 / 5).double())
    expected = [(block.gate.weight @ states[start : start + 3].mean(0)).softmax(-1) for start in (0, 3)]
    torch.testing.assert_close(gates[3:], torch.stack(expected).repeat_interleave(3, dim=0))


def segment_model(**fields) -> MoEForCausalLM:
    return MoEForCausalLM(tiny_config(**SEGMENTS, **fields)).eval()


@pytest.fixture
def batch():
    ids = torch.randint(3, 99, (2, 11))
    return {"input_ids": ids.masked_fill(MASK == 0, 0), "attention_mask": MASK}


def test_left_padding_changes_nothing_in_a_model(batch):
    model = segment_model().double()
    padded = model(**batch).logits[0, 4:]
    torch.testing.assert_close(padded, model(batch["input_ids"][:1, 4:]).logits[0], **FP32)


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 4}], ids=["full", "sliding"])
@pytest.mark.parametrize("chunks", [[1] * 11, [4, 1, 6], [5, 3, 2, 1]], ids=str)
def test_decoding_equals_one_pass(batch, chunks, fields):
    model = segment_model(**fields).double()
    cache, logits, done = DynamicCache(config=model.config), [], 0
    for count in chunks:
        ids = batch["input_ids"][:, done : done + count]
        done += count
        logits.append(model(ids, attention_mask=MASK[:, :done], past_key_values=cache).logits)
    real = MASK > 0
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], model(**batch).logits[real], **FP32)


LENGTH = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_equals_that_without(batch, beams):
    model = segment_model()
    texts = [model.generate(**batch, **LENGTH, num_beams=beams, use_cache=cache) for cache in (True, False)]
    assert texts[0].shape == (2, 19)
    assert torch.equal(*texts)


def test_speculation_equals_greedy(batch):
    model, ids = segment_model(), batch["input_ids"][1:]
    speculated = model.generate(ids, **LENGTH, prompt_lookup_num_tokens=2)
    assert torch.equal(speculated, model.generate(ids, **LENGTH))


def test_a_static_cache_is_refused(batch):
    with pytest.raises(ValueError, match="for which a static cache has no room: use a dynamic cache"):
        segment_model().generate(**batch, **LENGTH, cache_implementation="static", disable_compile=True)
