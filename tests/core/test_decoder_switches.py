"""The switches of attention, norms and blocks compute their formulas, and work with caches, packed rows and checkpointing."""

import logging

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_moe import MoEConfig, MoEForCausalLM
from tests.builders import tiny_config


LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}
LATENT |= {"num_key_value_heads": None, "head_dim": None}
LENGTH = {"rope_parameters": {"rope_theta": 100.0, "original_max_position_embeddings": 3}}
MIXED = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
# name of a switch -> the fields that set it, and the fields that it needs
SWITCHES = {
    "head bias": ({"lm_head_bias": True}, {}),
    "norm after rope": ({"qk_norm_after_rope": True}, {"qk_norm": "head"}),
    "output gate": ({"attn_output_gate": True}, {}),
    "query scale": ({"llama_4_scaling_beta": 0.5}, LENGTH),
    "query scale of latent attention": ({"llama_4_scaling_beta": 0.5}, LENGTH | LATENT),
    "norm of sparse outputs": ({"sparse_output_norm": True}, MIXED),
    "layer norm without bias": ({"norm_bias": False}, {"norm_type": "layer"}),
    "one norm": ({"norm_placement": "parallel_shared"}, MIXED),
}


def model_of(name: str) -> MoEForCausalLM:
    """Returns a model with a switch set and random norms and biases."""
    fields, needed = SWITCHES[name]
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**needed, **fields)).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "norm" in key or "bias" in key:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "layer norm without bias"])
def test_a_switch_changes_the_logits_of_equal_weights(name):
    fields, needed = SWITCHES[name]
    model, without = model_of(name), MoEForCausalLM(tiny_config(**needed)).eval()
    without.load_state_dict(model.state_dict(), strict=False)
    ids = torch.randint(3, 99, (2, 9))
    assert not torch.allclose(model(ids).logits, without(ids).logits, atol=1e-4)
    assert {key: getattr(without.config, key) for key in fields} != fields


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
    ],
)
def test_the_length_that_a_query_scale_reads_gives_no_warning(rope, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = tiny_config(llama_4_scaling_beta=0.5, rope_parameters=LENGTH["rope_parameters"] | rope)
    config.save_pretrained(tmp_path)
    assert MoEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert "Unrecognized keys" not in caplog.text
    # another entry still does
    tiny_config(rope_parameters=LENGTH["rope_parameters"] | {"unknown": 1})
    assert "Unrecognized keys" in caplog.text


@pytest.mark.parametrize("name", SWITCHES)
def test_a_cached_decode_gives_the_logits_of_one_pass(name):
    model = model_of(name)
    ids = torch.randint(3, 99, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        steps = [model(ids[:, i : i + 1], cache=first.cache, use_cache=True).logits for i in range(4, 9)]
    torch.testing.assert_close(torch.cat([first.logits, *steps], dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SWITCHES)
def test_sequences_of_a_packed_row_do_not_see_each_other(name):
    model = model_of(name)
    ids = torch.randint(3, 99, (1, 11))
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        alone = torch.cat([model(ids[:, :6]).logits, model(ids[:, 6:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SWITCHES)
def test_gradient_checkpointing_gives_equal_gradients(name):
    model = model_of(name).train()
    ids = torch.randint(3, 99, (2, 9))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({key: tensor.grad.clone() for key, tensor in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@pytest.mark.parametrize("name", ["norm after rope", "output gate", "query scale"])
def test_attention_computes_its_formula(name):
    """The formula is written out in float64: one key-value head per query head, and a mask of the past."""
    fields, needed = SWITCHES[name]
    config = tiny_config(**needed, **fields, num_key_value_heads=4, attn_implementation="eager")
    model = MoEForCausalLM(config).double().eval().model
    attention, rotary = model.layers[0].self_attn, model.rotary_emb
    states, positions = torch.randn(1, 7, 32, dtype=torch.float64), torch.arange(7)[None]
    angles = rotary(states, positions)
    future = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
    got, _ = attention(states, angles, future[None, None], position_ids=positions)

    query, key, value = (
        getattr(attention, f"{part}_proj")(states).view(1, 7, 4, 12).transpose(1, 2) for part in "qkv"
    )
    query, key = apply_rotary_pos_emb(query, key, *angles)
    if name == "norm after rope":
        query, key = (x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() for x in (query, key))
    if name == "query scale":
        query = query * (1 + 0.5 * torch.log(1 + positions // 3)).view(1, 1, 7, 1)
    probabilities = (query @ key.transpose(2, 3) * 12**-0.5 + future).softmax(-1)
    output = (probabilities @ value).transpose(1, 2).reshape(1, 7, 48)
    if name == "output gate":
        output = output / (1 + torch.exp(-attention.gate_proj(states)))
    torch.testing.assert_close(got, attention.o_proj(output), atol=1e-6, rtol=1e-6)


def test_the_query_scale_asks_for_positions():
    layer, states = model_of("query scale").model.layers[0], torch.randn(1, 5, 32)
    angles = (torch.ones(1, 5, 12), torch.zeros(1, 5, 12))
    for keywords in ({}, {"position_ids": None}):
        with pytest.raises(ValueError, match=r"llama_4_scaling_beta .*give the layer position_ids"):
            layer(states, position_embeddings=angles, **keywords)


def test_one_norm_feeds_attention_and_network():
    layer = model_of("one norm").model.layers[1]
    assert [name for name, module in layer.named_children() if "norm" in name] == ["input_layernorm"]
    states = torch.randn(1, 5, 32)
    layer.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    normed = layer.input_layernorm(states)
    torch.testing.assert_close(layer(states)[0], states + normed + layer.mlp(normed))


def test_only_sparse_layers_have_a_norm_of_their_output():
    layers = model_of("norm of sparse outputs").model.layers
    assert [hasattr(layer, "post_feedforward_layernorm") for layer in layers] == [True, False, True]
    layer, states = layers[0], torch.randn(1, 5, 32)
    layer.self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    output, _, _ = layer.mlp(layer.post_attention_layernorm(states))
    torch.testing.assert_close(layer(states)[0], states + layer.post_feedforward_layernorm(output))


def test_layer_norms_have_no_bias():
    norms = [module for module in model_of("layer norm without bias").modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 7
    assert all(norm.bias is None for norm in norms)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm_after_rope": True}, "qk_norm_after_rope is True, which nothing reads: set qk_norm='head'"),
        ({"qk_norm_after_rope": True, "qk_norm": "full"}, "qk_norm_after_rope is True.* set qk_norm='head'"),
        ({"attn_output_gate": True} | LATENT, "attn_output_gate is True, which nothing reads: unset kv_lora_rank"),
        ({"llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta is 0.1, which nothing reads: give rope_parameters an"),
        ({"norm_bias": False}, "norm_bias is False, which nothing reads: set norm_type='layer'"),
        (
            {"sparse_output_norm": True, "norm_placement": "post"},
            "sparse_output_norm is True.* choose a norm_placement",
        ),
        ({"sparse_output_norm": True, "mlp_layer_types": ["dense"] * 3}, "sparse_output_norm is True.* sparse layer"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
            "llama_4_scaling_beta of rope_parameters is not read there: set the field",
        ),
    ],
)
def test_a_switch_that_nothing_reads_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_hidden_layers": 3} | fields)
