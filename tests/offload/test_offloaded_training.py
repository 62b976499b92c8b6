"""LoRA trains on offloaded experts with the gradients of the resident model."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_moe import lora
from modeling_moe.offload import offload_experts
from tests.dispatch.kinds import NEEDS_NATIVE
from tests.offload.models import EXPERTS, TOP_K, build, copy_of


@pytest.fixture(autouse=True)
def enabled():
    lora.enable()
    yield
    lora.disable()


def adapted(name: str = "ours", dropout: float = 0.0, **options):
    """Returns a model with LoRA on its experts and on its attention."""
    model = build(name, **options)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, lora.layers.ParamWrapper):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    """Returns the loss and the gradients of a step."""
    torch.manual_seed(7)
    tokens = torch.randint(3, 99, (3, 12))
    model.train()
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    found = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert any("experts" in name for name in found)
    assert any("q_proj" in name for name in found)
    return {"loss": loss.detach(), **found}


def assert_gradients(model, expected, tolerance=0.0):
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("slots", [TOP_K, EXPERTS])
@pytest.mark.parametrize(
    ("implementation", "tolerance"),
    [pytest.param("moe_native", 0.0, marks=NEEDS_NATIVE), ("moe_loop", 0.0), ("moe_grouped_mm", 1e-6)],
)
def test_gradients_are_those_of_the_resident_model(implementation, tolerance, slots):
    resident = adapted(implementation=implementation)
    model = copy_of(resident)
    offload_experts(model, slots=slots)
    assert_gradients(model, gradients(resident), tolerance)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradients_of_models_of_transformers(name):
    resident = adapted(name)
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    assert_gradients(model, gradients(resident))


def test_dropout_hides_the_same_elements():
    resident = adapted(dropout=0.4)
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    assert_gradients(model, gradients(resident))


def test_gradient_checkpointing_computes_the_same_gradients():
    resident = adapted()
    expected = gradients(resident)
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_gradients(model, expected)


def test_recomputing_h_computes_the_same_gradients():
    resident = adapted(experts_recompute=True)
    model = copy_of(resident)
    offload_experts(model, slots=EXPERTS)
    assert_gradients(model, gradients(resident))


def test_an_adapter_can_be_added_after_the_experts_are_offloaded():
    resident = adapted()
    model = build("ours")
    offload_experts(model, slots=TOP_K)
    config = resident.peft_config["default"]
    model = get_peft_model(model, config)
    weights = {name: tensor for name, tensor in resident.state_dict().items() if "lora_" in name}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    assert_gradients(model, gradients(resident))


def test_the_adapter_is_saved_and_loaded_without_the_experts(tmp_path):
    resident = adapted()
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("ours"), tmp_path, is_trainable=True)
    assert_gradients(again, gradients(resident))


def test_adapters_are_not_merged_into_offloaded_experts():
    model = adapted()
    offload_experts(model, slots=TOP_K)
    with pytest.raises(ValueError, match="is offloaded: to merge, load the whole model"):
        model.merge_and_unload()


def test_a_second_derivative_is_refused():
    model = adapted()
    offload_experts(model, slots=TOP_K)
    tokens = torch.arange(3, 9)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, factors, create_graph=True)


def test_trainable_experts_are_refused():
    model = build("ours")
    offload_experts(model, slots=TOP_K)
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match=r"offloaded experts cannot be trained.*requires_grad_\(False\).*LoRA"):
        model(torch.arange(3, 9)[None])
    with torch.no_grad():
        model(torch.arange(3, 9)[None])


def test_experts_give_gradients_to_the_other_parameters():
    resident = build("ours")
    for name, parameter in resident.named_parameters():
        parameter.requires_grad_("experts" not in name)
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    tokens = torch.arange(3, 30)[None]
    for each in (resident, model):
        each.train()
        each(tokens, labels=tokens).loss.backward()
    found = dict(model.named_parameters())
    for name, parameter in resident.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(found[name].grad, parameter.grad), name
