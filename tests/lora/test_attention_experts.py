"""LoRA and 4 bits on the experts of attention equal PEFT's own path and the dequantized weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_moe.dispatch import halves
from modeling_moe.lora import moe_lora_config, quantize_experts
from tests.lora.checkpoints import IDS, fill
from tests.lora.test_peft import assert_same, model_of, results


MOA = {
    "routed_attention": "moa",
    "attention_experts": 5,
    "attention_experts_per_tok": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    # rows that the 4-bit format takes
    "hidden_size": 64,
    "head_dim": 16,
    "moe_intermediate_size": 64,
}
TARGETS = ["self_attn.experts.up_proj", "self_attn.experts.down_proj"]


def adapted(**changes):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["k_proj"], target_parameters=TARGETS, **changes)
    model = get_peft_model(model_of("moe", **MOA), config)
    fill(model, 0.2, only="lora_")
    return model


def test_equals_peft_without_its_updated_matrices(monkeypatch):
    layouts, operator = [], halves.half_experts

    def spy(tensors, layout, *arguments):
        layouts.append(layout)
        return operator(tensors, layout, *arguments)

    monkeypatch.setattr(halves, "half_experts", spy)
    model = adapted()
    got = results(model)
    assert layouts
    assert all("a b" in layout for layout in layouts)
    assert_same(got, results(model, alone=True))


def test_our_configuration_names_them_and_merging_keeps_the_logits():
    model = model_of("moe", **MOA)
    config = moe_lora_config(model, r=3, quiet=True)
    assert set(TARGETS) < set(config.target_parameters)
    assert "self_attn.gate" in config.modules_to_save
    model = get_peft_model(model, config).eval()
    fill(model, 0.2, only="lora_")
    with torch.no_grad():
        expected = model(IDS).logits
        assert not torch.allclose(expected, model.get_base_model()(IDS).logits * 0)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_dropout_is_drawn_for_each_product():
    model = get_peft_model(
        model_of("moe", **MOA), moe_lora_config(model_of("moe", **MOA), r=2, lora_dropout=0.5, quiet=True)
    )
    fill(model, 0.5, only="lora_")
    model.train()
    torch.manual_seed(1)
    first = model(IDS).logits
    torch.manual_seed(1)
    assert torch.equal(model(IDS).logits, first)
    assert not torch.allclose(model(IDS).logits, first)


@torch.no_grad()
def test_four_bits_equal_the_dequantized_matrices():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, reference = (model_of("moe", **MOA).bfloat16().eval() for _ in range(2))
    quantize_experts(model)
    for layer, other in zip(model.model.layers, reference.model.layers, strict=True):
        for name in ("up_proj", "down_proj"):
            assert name not in layer.self_attn.experts._parameters
            getattr(other.self_attn.experts, name).copy_(getattr(layer.self_attn.experts, name))
        if layer.is_sparse:
            for name in ("gate_up_proj", "down_proj"):
                getattr(other.mlp.experts, name).copy_(getattr(layer.mlp.experts, name))
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
