"""These tests find the experts and the routers of models, wrapped or not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from modeling_moe.lora import moe_lora_config
from modeling_moe.monitoring import UnreachableRouting, experts_modules, observe, sparse_layers
from tests.builders import SIZE, tiny_model
from tests.monitoring.moe_families import tiny_family
from tests.training.families import tiny


def test_layers_of_this_packages_model():
    model = tiny_model()
    found = sparse_layers(model)
    assert [layer.layer for layer in found] == [0, 2]
    for layer in found:
        block = model.model.layers[layer.layer].mlp
        assert layer.experts is block.experts
        assert layer.router is block.gate
        assert layer.num_experts == 5
        assert model.get_submodule(layer.name) is layer.experts


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_layers_of_transformers_models(family):
    model = tiny(family)
    found = sparse_layers(model)
    assert [layer.experts for layer in found] == experts_modules(model)
    for layer in found:
        assert layer.num_experts == 12
        holder = model.get_submodule(layer.name.removesuffix(".experts"))
        assert layer.router in {getattr(holder, "gate", None), getattr(holder, "router", None)} - {None}


@pytest.mark.parametrize("build", [tiny_model, lambda: tiny("mixtral"), lambda: tiny("olmoe")])
def test_the_router_inside_an_adapter_is_the_adapted_one(build):
    model = build()
    adapted = get_peft_model(model, moe_lora_config(model, r=2, router=True))
    seen = []
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            nn.init.normal_(parameter)
    layers = sparse_layers(adapted)
    assert all(layer.router is not None for layer in layers)
    ids = torch.arange(3, 15)[None]
    with observe(adapted, seen.append):
        logits = adapted(input_ids=ids, output_router_logits=True).router_logits
    for event, expected in zip(seen, logits, strict=True):
        # the chosen experts follow from the logits that were seen
        best = event.logits.topk(event.index.shape[-1]).indices.sort().values
        assert torch.equal(best, event.index.sort().values)
        assert event.logits.shape == expected.shape


def test_a_router_trained_in_full_beside_an_adapter_is_found():
    model = tiny("mixtral")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.modules_to_save["default"].weight.normal_()
    seen = []
    with observe(adapted, seen.append):
        adapted(input_ids=torch.arange(3, 15)[None])
    for event in seen:
        assert torch.equal(event.logits.topk(2).indices.sort().values, event.index.sort().values)


def test_two_experts_modules_of_one_decoder_layer_are_told_apart():
    model = tiny_family("ernie4_5_vl_moe")
    names = [layer.name.split(".")[-2] for layer in sparse_layers(model)]
    assert names == ["text_moe", "vision_moe"]
    routers = [layer.router for layer in sparse_layers(model)]
    assert routers[0] is not routers[1]
    assert None not in routers


def test_a_router_that_the_model_does_not_declare_has_the_place_of_those_that_it_does():
    first, *others = sparse_layers(tiny_family("deepseek_v4"))
    assert type(first.router) is not type(others[0].router)
    assert first.name.startswith("model.layers.0.")


def test_a_router_that_no_class_declares_is_the_module_with_a_row_for_each_expert(monkeypatch):
    model = tiny("qwen2_moe")
    # it also has a shared expert and the gate of that
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            monkeypatch.setattr(module, "_can_record_outputs", {}, raising=False)
    for layer in sparse_layers(model):
        assert layer.router is model.model.layers[layer.layer].mlp.gate
    model.model.layers[0].mlp.another = nn.Linear(32, 12)
    assert [layer.router is None for layer in sparse_layers(model)] == [True, False]


def test_a_dense_model_is_named():
    with pytest.raises(
        UnreachableRouting, match=r"^LlamaForCausalLM is a dense model: there is no routing to see\.$"
    ) as caught:
        sparse_layers(AutoModelForCausalLM.from_config(LlamaConfig(**SIZE)))
    assert caught.value.dense


def test_experts_beside_the_interface_are_named():
    config = CONFIG_MAPPING["jetmoe"](hidden_size=32, num_hidden_layers=1, intermediate_size=16, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UnreachableRouting, match=r"JetMoeMoE, which does not follow transformers' experts interface"
    ) as caught:
        sparse_layers(model)
    assert not caught.value.dense


def test_a_model_without_memory_has_layers():
    with torch.device("meta"):
        model = tiny_model()
    assert len(sparse_layers(model)) == 2
