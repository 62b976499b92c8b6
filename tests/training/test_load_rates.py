"""These tests check that each expert's step is scaled by the expert's share of the tokens."""

import copy

import pytest
import torch
from peft import get_peft_model

from modeling_moe.lora import moe_lora_config
from modeling_moe.monitoring import watch
from modeling_moe.training import parameter_groups, scale_by_load
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_model
from tests.training.families import tiny


def pair(make):
    """Returns two equal models with equal optimizers, the second scaled by load, and the handle."""
    models = [make(), make()]
    optimizers = [torch.optim.AdamW(parameter_groups(model, 1e-2, 0.3)) for model in models]
    return models, optimizers, scale_by_load(models[1], optimizers[1])


def skipping():
    return tiny_model(depth_layers=[0, 1, 1])


@pytest.mark.parametrize("make", [lambda: tiny("mixtral"), lambda: tiny("gpt_oss"), tiny_model, skipping])
def test_the_step_of_an_expert_is_scaled_by_the_root_of_its_share(make):
    """Two micro-batches with padding; the oracle is the plain step, times sqrt(n / T) by the watched load."""
    models, optimizers, _ = pair(make)
    before = {name: parameter.detach().clone().double() for name, parameter in models[0].named_parameters()}
    batches = [torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    with watch(models[0]) as routing:
        for model in models:
            for ids in batches:
                model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    layers = routing.read().layers
    for model, optimizer in zip(models, optimizers, strict=True):
        model.eval()(batches[0])  # evaluation does not count
        optimizer.step()
    shares = {layer.name: layer.load / layer.tokens for layer in layers}
    assert any((share == 0).any() for share in shares.values()) or make in (tiny_model, skipping)
    for name, parameter in models[1].named_parameters():
        plain = models[0].get_parameter(name).double()
        share = shares.get(name.rpartition(".")[0])
        if share is not None:
            factor = share.sqrt().view(-1, *[1] * (parameter.dim() - 1))
            plain = before[name] + factor * (plain - before[name])
        torch.testing.assert_close(parameter.double(), plain, rtol=0, atol=1e-6 if share is not None else 0)
        if share is not None:
            assert torch.equal(parameter[share == 0].double(), before[name][share == 0])


def test_a_step_counts_its_own_tokens_alone_and_a_removed_handle_does_nothing():
    models, optimizers, handle = pair(lambda: tiny("mixtral"))
    for seed in range(2):
        ids = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(seed))
        models[1].train()(ids, labels=ids).loss.backward()
        assert all(share.sum() == 2 for share in handle.shares().values())
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert all(not share.any() for share in handle.shares().values())
    handle.remove()
    models[0].load_state_dict(models[1].state_dict())
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))


def test_refusals():
    model = tiny_model()
    adapted = get_peft_model(model, moe_lora_config(model, r=2))
    with pytest.raises(UserError, match="the optimizer does not step the experts' own weights"):
        scale_by_load(adapted, torch.optim.SGD(parameter_groups(adapted, 1.0)))
    assert not any(module._forward_pre_hooks for module in adapted.modules())
    model = tiny("jetmoe")
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(UserError, match="experts cannot be trained by their load: JetMoeForCausalLM computes"):
        scale_by_load(model, optimizer)


def test_a_step_without_a_training_pass_and_switch_head_are_refused():
    model = tiny_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = scale_by_load(model, optimizer)
    ids = torch.arange(4, 20)[None]
    model(ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match=r"no training pass since the last step was seen: call model.train\(\)"):
        optimizer.step()
    handle.remove()
    fields = {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_experts": 3}
    model = tiny_model(routed_attention="switch_head", **fields)
    with pytest.raises(UserError, match="routed_attention='switch_head'"):
        scale_by_load(model, torch.optim.SGD(model.parameters()))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_second_handle_on_an_optimizer_is_refused():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters())
    handle = scale_by_load(model, optimizer)
    with pytest.raises(UserError, match="trains experts by their load already: call remove"):
        scale_by_load(model, optimizer)
    handle.remove()
    handle.remove()
    second = scale_by_load(model, optimizer)
    handle.remove()  # which does not open the way for a third handle
    with pytest.raises(UserError, match="trains experts by their load already"):
        scale_by_load(model, optimizer)
    second.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
