"""These tests compare latent attention with transformers' DeepSeek-V2 and V3: outputs, gradients and caches."""

import math

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations import flash_attention
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Config,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_moe.attention_latent import MoELatentAttention
from tests.builders import tiny_config


BATCH, LENGTH, HIDDEN, HEADS, NOPE, ROPE, VALUE, LATENT = 2, 7, 32, 4, 6, 8, 10, 12
FIELDS = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": LATENT,
    "q_lora_rank": 20,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    # so large that the outputs would differ if the norms of the latents used it
    "rms_norm_eps": 0.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
DEEPSEEK = {
    "v2": (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
    "v3": (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
}


def causal_mask(positions: torch.Tensor, keys: int) -> torch.Tensor:
    hidden = torch.arange(keys) > positions[0, :, None]
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]


POSITIONS = torch.arange(LENGTH)[None]
MASK = causal_mask(POSITIONS, LENGTH)


def in_halves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reorders the rotary rows of DeepSeek's tensors, or of their gradients, from pairs to halves."""
    halves = torch.cat((torch.arange(0, ROPE, 2), torch.arange(1, ROPE, 2)))
    head = torch.cat((torch.arange(NOPE), NOPE + halves))
    query = torch.cat([i * (NOPE + ROPE) + head for i in range(HEADS)])
    latent = torch.cat((torch.arange(LATENT), LATENT + halves))
    rows = {"q_proj": query, "q_b_proj": query, "kv_a_proj_with_mqa": latent}
    return {name: x[rows.get(name.split(".")[0], slice(None))] for name, x in state.items()}


def make_ours(implementation: str, layer_idx: int = 0, **fields) -> MoELatentAttention:
    config = tiny_config(**(FIELDS | fields))
    config._attn_implementation = implementation
    return MoELatentAttention(config, layer_idx)


def make_pair(family: str, implementation: str = "eager", **fields):
    """Returns DeepSeek's layer and rotary embedding, and our layer with the same random weights."""
    config_class, attention_class, rotary_class = DEEPSEEK[family]
    rope = fields.pop("rope_parameters", {"rope_type": "default", "rope_theta": 100.0})
    multiplier = fields.pop("attention_multiplier", None)
    config = config_class(**(FIELDS | fields), rope_parameters=dict(rope), attn_implementation=implementation)
    theirs = attention_class(config, layer_idx=0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = make_ours(implementation, **fields, rope_parameters=dict(rope), attention_multiplier=multiplier)
    ours.load_state_dict(in_halves(theirs.state_dict()))
    return theirs, rotary_class(config), ours


def cos_sin(ours, positions: torch.Tensor = POSITIONS) -> tuple[torch.Tensor, torch.Tensor]:
    return LlamaRotaryEmbedding(ours.config)(torch.zeros(1), positions)


def run(attention, rotary, states, **arguments):
    mask = arguments.pop("attention_mask", MASK)
    return attention(states, position_embeddings=rotary, attention_mask=mask, **arguments)


def assert_close(actual, expected):
    """Compares tensors to 1e-6 of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def assert_equal_to_deepseek(theirs, rotary, ours, mask):
    """Latent attention equals DeepSeek's in outputs, probabilities, and gradients of input and weights."""
    states = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    copy = states.detach().clone().requires_grad_()
    expected, expected_weights = run(theirs, rotary(states, POSITIONS), states, attention_mask=mask)
    output, weights = run(ours, cos_sin(ours), copy, attention_mask=mask)
    assert_close(output, expected)
    if expected_weights is None:
        assert weights is None
    else:
        assert_close(weights, expected_weights)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    output.backward(upstream)
    assert_close(copy.grad, states.grad)
    gradients = in_halves({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("family", DEEPSEEK)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"attention_bias": True, "q_lora_rank": None}],
    ids=str,
)
def test_equals_deepseek(family, implementation, fields):
    theirs, rotary, ours = make_pair(family, implementation, **fields)
    mask = None if implementation == "sdpa" else MASK
    assert_equal_to_deepseek(theirs, rotary, ours, mask)


@pytest.mark.parametrize("family", DEEPSEEK)
def test_equals_deepseek_with_yarn(family):
    scale = (NOPE + ROPE) ** -0.5 * (0.1 * YARN["mscale_all_dim"] * math.log(YARN["factor"]) + 1) ** 2
    theirs, rotary, ours = make_pair(family, rope_parameters=YARN, attention_multiplier=scale)
    assert rotary.attention_scaling != 1
    assert_equal_to_deepseek(theirs, rotary, ours, MASK)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_equals_one_pass(implementation, kind):
    theirs, rotary, ours = make_pair("v3", implementation)
    states = torch.randn(BATCH, LENGTH, HIDDEN)
    expected, _ = run(theirs, rotary(states, POSITIONS), states)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(ours.config, max_cache_len=LENGTH + 2)
    outputs = []
    for start, stop in [(0, 4), (4, 6), (6, 7)]:
        positions = torch.arange(start, stop)[None]
        keys = stop if kind == "dynamic" else LENGTH + 2
        outputs.append(
            run(
                ours,
                cos_sin(ours, positions),
                states[:, start:stop],
                attention_mask=causal_mask(positions, keys),
                past_key_values=cache,
            )[0]
        )
    assert_close(torch.cat(outputs, dim=1), expected)
    length = LENGTH if kind == "dynamic" else LENGTH + 2
    assert cache.layers[0].keys.shape == (BATCH, 1, length, ours.kv_lora_rank)
    assert cache.layers[0].values.shape == (BATCH, 1, length, ROPE)


def test_flash_attention_gets_one_width(monkeypatch):
    ours, reference = make_ours("flash_attention_2", attention_dropout=0.25), make_ours("sdpa")
    reference.load_state_dict(ours.state_dict())
    seen = {}

    def kernel(query, key, value, attention_mask, **arguments):
        seen.update(arguments)
        assert query.shape == key.shape == value.shape == (BATCH, LENGTH, HEADS, NOPE + ROPE)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scale = arguments["softmax_scale"]
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return output.transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    states, rotary = torch.randn(BATCH, LENGTH, HIDDEN), cos_sin(ours)
    output, _ = run(ours, rotary, states, attention_mask=None, max_length_q=LENGTH)
    expected, _ = run(reference, rotary, states, attention_mask=None)
    assert_close(output, expected)
    assert (seen["dropout"], seen["max_length_q"]) == (0.25, LENGTH)
    run(ours.eval(), rotary, states, attention_mask=None)
    assert seen["dropout"] == 0


def test_window_reaches_the_kernel(monkeypatch):
    windows = []

    def kernel(query, key, value, attention_mask, **arguments):
        windows.append(arguments["sliding_window"])
        return value

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    for layer_idx in range(2):
        ours = make_ours("flash_attention_2", layer_idx, sliding_window=3, layer_types=layer_types)
        rotary = cos_sin(ours)
        run(ours, rotary, torch.randn(BATCH, LENGTH, HIDDEN), attention_mask=None)
    assert windows == [None, 3]


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_runs_on_a_share_of_the_heads(q_lora_rank):
    """The outputs of a layer's tensor-parallel shares sum to the output of the layer."""
    ours = make_ours("eager", q_lora_rank=q_lora_rank)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    states, rotary = torch.randn(BATCH, LENGTH, HIDDEN), cos_sin(ours)
    expected, _ = run(ours, rotary, states)
    total = torch.zeros_like(expected)
    whole = {name: module.weight for name, module in ours.named_children()}
    for share in range(2):
        for name in ("q_proj" if q_lora_rank is None else "q_b_proj", "kv_b_proj", "o_proj"):
            part = whole[name].chunk(2, dim=1 if name == "o_proj" else 0)[share]
            getattr(ours, name).weight = nn.Parameter(part.detach())
        total = total + run(ours, rotary, states)[0]
    assert_close(total, expected)
