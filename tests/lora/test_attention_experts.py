"""LoRA and 4 bits on the experts of attention equal PEFT's own path and the dequantized weights."""

import copy
import tempfile

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_moe.dispatch import halves
from modeling_moe.lora import moe_lora_config, quantize_experts
from modeling_moe.router_balancing import update_routers
from modeling_moe.utils.errors import UserError
from tests.core.attention_variants import VARIANTS
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
# forms of attention whose experts have matrices
WITH_MATRICES = ("moa", "switch_head")


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


# where there are routers beside those of attention
PLACES = {
    "alone": {"mlp_layer_types": ["dense"] * 3},
    "with networks": {"mlp_layer_types": ["sparse"] * 3},
    "with depth": {"mlp_layer_types": ["dense"] * 3, "depth_layers": [0, 1, 0], "depth_capacity": 0.5},
}


# the Routing Transformer is refused with depth
@pytest.mark.parametrize(
    ("variant", "place"), [(x, y) for x in VARIANTS for y in PLACES if (x, y) != ("routing_transformer", "with depth")]
)
def test_an_adapter_trains_and_keeps_all_routers(variant, place):
    fields = VARIANTS[variant] | PLACES[place]
    if variant == "routing_transformer":
        fields |= {"router_ema_decay": 0.5}
    model = model_of("moe", **fields)
    base, config = copy.deepcopy(model), moe_lora_config(model, r=2, quiet=True)
    found = {name for name in config.target_parameters or () if name.startswith("self_attn")}
    assert found == (set(TARGETS) if variant in WITH_MATRICES else set())
    also = {"alone": set(), "with networks": {"mlp.gate"}, "with depth": {"depth.gate"}}[place]
    assert set(config.modules_to_save) == {"self_attn.gate"} | also
    model = get_peft_model(model, config).train()
    fill(model, 0.2, only="lora_")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    torch.optim.SGD(trained, lr=0.5).step()
    update_routers(model)
    assert_kept(model, base)


@torch.no_grad()
def assert_kept(model, base) -> None:
    """Asserts that an adapter on `base`, saved and loaded, and merged, gives the logits of `model`."""
    expected = model.eval()(IDS).logits
    assert (expected - base.eval()(IDS).logits).abs().max() > 0.005
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(loaded(IDS).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(IDS).logits, expected, atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize("variant", WITH_MATRICES)
@torch.no_grad()
def test_four_bits_equal_the_dequantized_matrices(variant):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    fields = MOA | VARIANTS[variant]
    model, reference = (model_of("moe", **fields).bfloat16().eval() for _ in range(2))
    quantize_experts(model)
    for layer, other in zip(model.model.layers, reference.model.layers, strict=True):
        for name in ("up_proj", "down_proj"):
            assert name not in layer.self_attn.experts._parameters
            getattr(other.self_attn.experts, name).copy_(getattr(layer.self_attn.experts, name))
        if layer.is_sparse:
            for name in ("gate_up_proj", "down_proj"):
                getattr(other.mlp.experts, name).copy_(getattr(layer.mlp.experts, name))
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in WITH_MATRICES])
def test_attention_without_matrices_of_experts_has_nothing_for_4_bits(variant):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(UserError, match="model has no experts that are not in 4 bits already"):
        quantize_experts(model_of("moe", **VARIANTS[variant], mlp_layer_types=["dense"] * 3))
