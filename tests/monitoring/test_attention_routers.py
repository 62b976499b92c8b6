"""The recorder, the loss meter and the expert cache know the routers of attention beside those of networks."""

import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.monitoring import watch
from modeling_moe.monitoring.loss_meter import RouterLossMeter
from modeling_moe.offload import offload_experts
from tests.builders import tiny_config


MOA = {
    "routed_attention": "moa",
    "attention_experts": 4,
    "attention_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


def model_of(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(**MOA, **fields))


def test_the_recorder_names_each_kind_and_counts_its_load():
    model = model_of(scoring_func="sigmoid").eval()
    with watch(model) as routing:
        outputs = model(IDS, output_router_logits=True)
    figures = {figures.name: figures for figures in routing.read().layers}
    loads = {f"model.layers.{i}.self_attn.experts": load for i, load in enumerate(outputs.attention_expert_load)}
    loads |= {f"model.layers.{i}.mlp.experts": load for i, load in zip((0, 2), outputs.expert_load, strict=True)}
    assert figures.keys() == loads.keys()
    for name, load in loads.items():
        assert figures[name].load.tolist() == load.tolist()
        assert figures[name].num_experts == len(load)
    # layers with two routers are labelled by their modules
    assert {figures[name].label for name in loads} == set(loads) - {"model.layers.1.self_attn.experts"} | {"layer_01"}


def test_the_loss_meter_adds_the_kinds():
    model = model_of(router_aux_loss_coef=0.1, router_z_loss_coef=0.2).train()
    meter = RouterLossMeter(model)
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    read = meter.read()
    meter.close()
    z = sum(
        torch.stack([logits.logsumexp(dim=-1).square().mean() for logits in routers]).mean()
        for routers in (outputs.router_logits, outputs.attention_router_logits)
    )
    torch.testing.assert_close(torch.as_tensor(read["z"]), z.double().float(), rtol=1e-5, atol=0, check_dtype=False)
    torch.testing.assert_close(torch.as_tensor(read["balance"]), outputs.aux_loss, check_dtype=False)


def test_the_expert_cache_leaves_the_experts_of_attention_in_memory():
    model = model_of(experts_implementation="moe").eval()
    with torch.no_grad():
        expected = model(IDS).logits
        offload_experts(model, slots=4)
        assert torch.equal(model(IDS).logits, expected)
    attention, network = model.model.layers[0].self_attn.experts, model.model.layers[0].mlp.experts
    assert attention.up_proj.device.type == "cpu"
    assert network.down_proj.device.type == "meta"
