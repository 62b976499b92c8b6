"""These tests check that routers of any MoE adapt by gradient steps, alone and for a time, and that they can be trained for it."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.lora import moe_lora_config
from modeling_moe.monitoring import next_labels
from modeling_moe.training import adapt_router, meta_gradient, router_parameters
from modeling_moe.utils.errors import UserError
from tests.builders import SMALLEST, tiny_config
from tests.monitoring.moe_families import tiny_family


IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
QUERY = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(2))
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"]


def model_of(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(**fields)).double().train()


def by_hand(model, ids, rate: float, steps: int) -> dict[str, torch.Tensor]:
    """Returns the routers' weights after plain gradient descent on a copy of the model."""
    twin = copy.deepcopy(model).eval()
    gates = {name: p for name, p in twin.named_parameters() if ".mlp.gate." in name}
    for _ in range(steps):
        twin.zero_grad()
        logits = twin(ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        with torch.no_grad():
            for parameter in gates.values():
                parameter -= rate * parameter.grad
    return {name: p.detach().clone() for name, p in gates.items()}


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_is_gradient_descent_on_the_routers_alone(steps):
    model = model_of(router_jitter_noise=0.1, router_aux_loss_coef=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    expected = by_hand(model, IDS, 2.0, steps)
    with adapt_router(model, IDS, learning_rate=2.0, steps=steps) as adaptation:
        for name, tensor in model.state_dict().items():
            if name in expected:
                torch.testing.assert_close(tensor, expected[name], atol=1e-12, rtol=1e-12)
                assert not torch.equal(tensor, before[name])
            else:
                assert torch.equal(tensor, before[name])
        assert len(adaptation.losses) == steps
        assert adaptation.losses == sorted(adaptation.losses, reverse=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_without_a_block_the_routers_stay_adapted_until_they_are_restored():
    model = model_of().eval()
    before = model(QUERY).logits
    adaptation = adapt_router(model, IDS[0], learning_rate=5.0)
    assert not torch.equal(model(QUERY).logits, before)
    assert set(adaptation.change()) == set(router_parameters(model))
    adaptation.restore()
    adaptation.restore()
    assert torch.equal(model(QUERY).logits, before)


def test_no_token_is_predicted_from_padding_or_is_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    assert next_labels(torch.arange(6)[None], mask).tolist() == [[-100, -100, 3, 4, -100]]
    assert next_labels(torch.arange(6)[None]).tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize("rows", [slice(None), 0])
def test_padding_is_not_learned(rows):
    """Of two rows, and of one row without a dimension for rows."""
    model = model_of()
    padded = torch.cat([IDS, torch.zeros(2, 4, dtype=torch.long)], dim=1)[rows]
    mask = (torch.arange(16) < 12).long().expand(2, -1)[rows]
    with adapt_router(model, IDS[rows], learning_rate=1.0) as plain:
        expected = plain.change()
    with adapt_router(model, padded, learning_rate=1.0, attention_mask=mask) as adaptation:
        assert adaptation.losses == pytest.approx(plain.losses, abs=1e-10)
        for name, change in adaptation.change().items():
            torch.testing.assert_close(change, expected[name], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routers_of_any_moe_adapt(family):
    model = tiny_family(family).eval()
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, 12))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapt_router(model, ids, learning_rate=1.0) as adaptation:
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed
        assert changed <= set(router_parameters(model))
        assert all("experts." not in name and "layers" in name for name in changed)
        assert adaptation.losses[0] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_of_the_router_adapts_in_the_place_of_the_router():
    model = model_of().float()
    adapted = get_peft_model(model, moe_lora_config(model, r=2, experts=False, router=True))
    names = set(router_parameters(adapted))
    assert names
    assert all(".modules_to_save." in name for name in names)
    assert all(parameter.requires_grad for parameter in router_parameters(adapted).values())
    before = adapted(QUERY).logits
    with adapt_router(adapted, IDS, learning_rate=50.0):
        assert not torch.equal(adapted(QUERY).logits, before)


def test_fomaml_is_the_gradient_at_the_adapted_weights():
    model = model_of(router_aux_loss_coef=0.1)
    twin = copy.deepcopy(model)
    adapted = by_hand(twin, IDS, 2.0, 2)
    twin.load_state_dict(twin.state_dict() | adapted)
    twin.zero_grad()
    expected_loss = twin(QUERY, labels=QUERY).loss
    expected_loss.backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # gradients add up
        loss = meta_gradient(model, IDS, QUERY, learning_rate=2.0, steps=2, weight=0.5)
    assert loss == pytest.approx(expected_loss.item(), abs=1e-12)
    gates = router_parameters(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        if name in gates:
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, atol=1e-12, rtol=1e-10)
        else:
            assert parameter.grad is None


def test_the_domains_of_a_step_are_not_taken_for_steps_without_update_routers():
    model = model_of(router_selection_bias=True, router_bias_update_rate=0.01)
    warned = model.model.router_totals.warned
    for _ in range(3):
        meta_gradient(model, IDS, QUERY, learning_rate=2.0)
    assert not warned
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # the routers alone have gradients
    meta_gradient(model, IDS, QUERY, learning_rate=2.0)
    assert warned == {"forgotten"}


@pytest.mark.parametrize("method", ["fomaml", "reptile"])
def test_padding_of_support_and_query_changes_no_outer_gradient(method):
    models = [model_of(), model_of()]
    meta_gradient(models[0], IDS, QUERY, learning_rate=2.0, method=method)
    padded, masks = [], {}
    for name, ids in {"support_mask": IDS, "query_mask": QUERY}.items():
        padded.append(torch.nn.functional.pad(ids, (0, 3)))
        masks[name] = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    meta_gradient(models[1], *padded, learning_rate=2.0, method=method, **masks)
    for one, two in zip(*(router_parameters(model).values() for model in models), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-12, rtol=1e-10)


def test_frozen_routers_and_a_support_of_padding_are_refused():
    model = model_of()
    with pytest.raises(UserError, match="support_ids has no token to predict"):
        adapt_router(model, IDS, learning_rate=1.0, attention_mask=torch.zeros_like(IDS))
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"the routers are frozen.*requires_grad_\(True\)"):
        meta_gradient(model, IDS, QUERY, learning_rate=1.0)


def test_reptile_is_the_way_back_from_the_last_weights():
    model = model_of()
    first = by_hand(model, IDS, 2.0, 1)
    twin = copy.deepcopy(model)
    twin.load_state_dict(twin.state_dict() | first)
    last = by_hand(twin, QUERY, 2.0, 1)
    meta_gradient(model, IDS, QUERY, learning_rate=2.0, method="reptile")
    for name, parameter in router_parameters(model).items():
        torch.testing.assert_close(parameter.grad, (parameter.detach() - last[name]) / 2.0, atol=1e-12, rtol=1e-10)


def test_a_pass_that_fails_leaves_the_routers_as_they_were():
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        adapt_router(model, IDS, learning_rate=1.0, steps=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_what_cannot_be_adapted_is_refused():
    model = model_of()
    with pytest.raises(UserError, match="both must be positive"):
        adapt_router(model, IDS, learning_rate=0.0)
    with pytest.raises(UserError, match="both must be positive"):
        adapt_router(model, IDS, learning_rate=1.0, steps=0)
    with pytest.raises(UserError, match="give at least 2"):
        adapt_router(model, IDS[:, :1], learning_rate=1.0)
    with pytest.raises(UserError, match=r"attention_mask is \(12,\) and support_ids \(2, 12\): give one shape"):
        adapt_router(model, IDS, learning_rate=1.0, attention_mask=torch.ones(12))
    with pytest.raises(UserError, match="no router with weights"):
        adapt_router(model_of(router_type="hash"), IDS, learning_rate=1.0)
    with pytest.raises(UserError, match="is a dense model"):
        adapt_router(LlamaForCausalLM(LlamaConfig(**SMALLEST)), IDS, learning_rate=1.0)
    with pytest.raises(UserError, match="one of fomaml, reptile"):
        meta_gradient(model, IDS, QUERY, learning_rate=1.0, method="maml")
