"""Models, budgets and uses that an expert cache cannot serve are refused in one sentence."""

import copy
import pickle
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moe.offload import offload_experts, offload_statistics, offload_to_stores
from modeling_moe.offload.slots import slot_bytes
from tests.builders import SMALLEST
from tests.offload.models import EXPERTS, TOP_K, build, copy_of, outputs


@pytest.fixture(scope="module")
def resident():
    return build("ours")


@pytest.fixture(scope="module")
def offloaded(resident):
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    return model


def least_bytes(model) -> int:
    """Returns the bytes of K slots of each layer."""
    experts = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    shapes = [tensor.shape[1:] for module in experts for tensor in (module.gate_up_proj, module.down_proj)]
    return TOP_K * sum(slot_bytes(tuple(shape), torch.float32) for shape in shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either budget, such as '4GiB', or slots"),
        ({"budget": "1GiB", "slots": 3}, "give either budget"),
        ({"slots": TOP_K - 1}, f"slots=2 holds 2 experts of each layer, and one token needs {TOP_K}"),
        ({"budget": "1KiB"}, "budget='1KiB' holds 0 experts of each layer"),
        ({"budget": "much"}, "budget='much' is no size: write a number of bytes"),
        ({"budget": 4e9}, "budget=4000000000.0 is no size: write a number of bytes"),
        ({"budget": True}, "budget=True is no size"),
        ({"budget": "-4GB"}, "budget='-4GB' is no size"),
        ({"budget": 0}, "budget=0 holds 0 experts of each layer"),
        ({"slots": 3.5}, "slots=3.5 is no whole number"),
        ({"slots": "3"}, "slots='3' is no whole number"),
        ({"slots": True}, "slots=True is no whole number"),
        ({"slots": TOP_K, "prefetch": -1}, "prefetch=-1 is no number of experts: give how many to load ahead"),
        ({"slots": TOP_K, "prefetch": True}, "prefetch=True is no number of experts"),
        ({"slots": TOP_K, "policy": "random"}, "policy is 'random': choose one of lru"),
        ({"slots": TOP_K, "tier": "tape"}, "tier='tape' is unknown: use 'pinned' or 'disk'"),
        ({"slots": TOP_K, "folder": "somewhere"}, "folder is read with tier='disk' only"),
        ({"slots": TOP_K, "tier": "disk"}, "tier='disk' needs the checkpoint that the model came from: set folder"),
    ],
)
def test_arguments(resident, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        offload_experts(resident, **arguments)
    assert not resident.model.layers[0].mlp.experts.down_proj.is_meta


def test_the_message_names_the_least_budget_and_this_budget_serves(resident):
    least, model = least_bytes(resident), copy_of(resident)
    with pytest.raises(ValueError, match=f"budget to at least {least} \\(bytes\\)"):
        offload_experts(model, budget=least - 1)
    offload_experts(model, budget=least)
    expected = outputs(resident)
    assert all(torch.equal(got, expected[name]) for name, got in outputs(model).items())


def test_a_budget_counts_the_slots_of_all_layers(resident):
    model = copy_of(resident)
    statistics = offload_experts(model, budget=least_bytes(resident) * (TOP_K + 1) // TOP_K)
    caches = [layer.mlp.experts.offloaded.cache for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    assert [len(cache.slots.experts) for cache in caches] == [TOP_K + 1] * len(statistics.layers)
    large = copy_of(resident)
    offload_experts(large, budget="1GiB")
    assert len(large.model.layers[0].mlp.experts.offloaded.cache.slots.experts) == EXPERTS


def test_dense_models():
    model = LlamaForCausalLM(LlamaConfig(**SMALLEST))
    with pytest.raises(ValueError, match="has no experts that transformers' experts interface calls"):
        offload_experts(model, slots=2)
    with pytest.raises(ValueError, match="is not offloaded: call offload_experts first"):
        offload_statistics(model)


def test_models_that_are_offloaded_already(offloaded):
    with pytest.raises(ValueError, match="is offloaded already"):
        offload_experts(offloaded, slots=TOP_K)


def test_experts_that_the_dispatch_does_not_serve(resident):
    model = copy_of(resident)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.act_fn = torch.nn.Softplus()
    with pytest.raises(ValueError, match=r"experts \(MoEExperts\) cannot be offloaded: its gate or activation"):
        offload_experts(model, slots=TOP_K)


def test_routers_that_merge_experts():
    model = build("ours", router_type="lory", num_shared_experts=0)
    with pytest.raises(ValueError, match="router_type='lory' merges all experts"):
        offload_experts(model, slots=TOP_K)


def test_the_implementation_alone_is_refused(resident):
    model = copy_of(resident)
    model.set_experts_implementation("moe_offloaded")
    with pytest.raises(ValueError, match="needs experts in a cache: call offload_experts"):
        model(torch.arange(3, 9)[None])


def test_saving_copying_and_loading(offloaded, resident, tmp_path):
    with pytest.raises(ValueError, match="an offloaded model cannot be saved"):
        offloaded.state_dict()
    with pytest.raises(ValueError, match="an offloaded model cannot be saved"):
        offloaded.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="cannot be copied"):
        copy.deepcopy(offloaded)
    with pytest.raises(ValueError, match="cannot be pickled"):
        pickle.dumps(offloaded.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match="cannot be loaded into offloaded experts"):
        offloaded.load_state_dict(resident.state_dict())


def test_moving_and_casting(offloaded):
    assert offloaded.to("cpu") is offloaded
    offloaded.float()
    with pytest.raises(ValueError, match=r"cannot be moved to cpu in torch\.bfloat16"):
        offloaded.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cannot be moved to meta"):
        offloaded.model.layers[0].mlp.to("meta")
    offloaded(torch.arange(3, 9)[None])


def test_tokens_on_another_device(offloaded):
    experts = offloaded.model.layers[0].mlp.experts
    index = torch.zeros(4, TOP_K, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="slots are on cpu and the tokens on meta"):
        experts(torch.zeros(4, 32, device="meta"), index, torch.zeros(4, TOP_K, device="meta"))


@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_experts_on_disk_have_the_bits_of_the_model(name, tmp_path):
    resident = build(name)
    resident.save_pretrained(tmp_path)
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K, tier="disk", folder=tmp_path)
    expected = outputs(resident)
    assert all(torch.equal(got, expected[key]) for key, got in outputs(model).items())
    changed = copy_of(resident)
    with torch.no_grad():
        changed.model.layers[0].mlp.experts.down_proj += 1
    with pytest.raises(
        ValueError, match=r"differs from the checkpoint in .*, so the model was changed after it was loaded"
    ):
        offload_experts(changed, slots=TOP_K, tier="disk", folder=tmp_path)


def test_stores_need_every_layer(resident):
    with pytest.raises(ValueError, match=r"stores has no store for model\.layers\.0\.mlp\.experts"):
        offload_to_stores(copy_of(resident), {}, slots=TOP_K)


def test_prefetch_leaves_the_bits(resident):
    model = copy_of(resident)
    statistics = offload_experts(model, slots=TOP_K + 1, prefetch=1)
    expected = outputs(resident)
    assert all(torch.equal(got, expected[key]) for key, got in outputs(model).items())
    assert statistics.total.prefetched > 0
