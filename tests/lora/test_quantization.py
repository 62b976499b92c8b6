"""These tests compare experts in 4 bits with a model of the dequantized weights, and check what backward keeps."""

import copy
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.dispatch import interface
from modeling_moe.lora import moe_lora_config, quantize_experts
from modeling_moe.lora.layers import MATRICES, is_experts
from modeling_moe.utils.errors import UserError
from tests.lora.checkpoints import IDS, TARGETS, build, fill, train
from tests.lora.test_peft import FAMILIES, model_of, results


bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def adapted(family: str, dtype=torch.bfloat16, device: str = "cpu", **fields):
    model = model_of(family, **fields).to(device, dtype)
    model = get_peft_model(model, moe_lora_config(model, r=2, lora_alpha=3))
    fill(model, 0.2, only="lora_")
    return model


def experts_of(model):
    return [module for module in model.modules() if is_experts(module)]


def matrices_of(model):
    return [(module, name) for module in experts_of(model) for name in MATRICES if hasattr(module, name)]


@torch.no_grad()
def pair(
    family: str,
    dtype=torch.bfloat16,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    device: str = "cpu",
    **fields,
):
    """Returns a model in 4 bits, and a model in `dtype` with the dequantized weights."""
    model, reference = (adapted(family, dtype, device, **fields) for _ in range(2))
    quantize_experts(model, quant_type, compress_statistics)
    for (module, name), (other, _) in zip(matrices_of(model), matrices_of(reference), strict=True):
        getattr(other, name).copy_(getattr(module, name))
    return model, reference


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert all(tensor.any() for tensor in expected.values())
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_equals_the_dequantized_model(family, dtype, device):
    model, reference = pair(family, dtype, device=device)
    for module, name in matrices_of(model):
        weight = getattr(module, name)
        assert parametrize.is_parametrized(module, name)
        assert (weight.dtype, weight.dim(), weight.requires_grad) == (dtype, 3, False)
    got, expected = results(model), results(reference)
    assert any("experts.lora_A" in name for name in got)
    assert any("experts.base_layer.lora_B" in name for name in got)
    assert_equal(got, expected)


@pytest.mark.parametrize("fields", [{"gated_experts": False, "mlp_bias": True}, {"num_null_experts": 2}])
def test_our_other_experts(fields):
    model, reference = pair("moe", **fields)
    assert_equal(results(model), results(reference))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [False, True])
def test_close_to_what_was_there(quant_type, compress_statistics):
    """The error is at most half the widest gap between two levels, relative to the largest of 64 numbers."""
    module = MoEForCausalLM(
        MoEConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    )
    experts = experts_of(module)[0]
    torch.nn.init.normal_(experts.down_proj)
    before = experts.down_proj.detach().clone().view(-1, 64)
    quantize_experts(module, quant_type, compress_statistics)
    error = (experts.down_proj.view(-1, 64) - before).abs().amax(dim=1) / before.abs().amax(dim=1)
    levels = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu").sort().values
    bound = levels.diff().max().item() / 2
    assert bound / 2 < error.max() < bound * (1.1 if compress_statistics else 1.001)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["moe", "gpt_oss"])
def test_checkpointing(family, reentrant, device):
    model, reference = pair(family, device=device)
    expected = results(reference.train())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_equal(results(model.train()), expected)
    assert not parametrize._cache


def saved(call) -> tuple[list, int]:
    """Returns the result of `call`, and the bytes that it saves for backward."""
    kept = {}

    def pack(tensor):
        # keeps the storage, so that no other takes the same address
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), sum(storage.nbytes() for storage in kept.values())


def watch(model) -> list[StorageWeakRef]:
    """Returns a list that receives the storage of each matrix that is dequantized from now on."""
    made = []
    for module, name in matrices_of(model):
        module.parametrizations[name][0].register_forward_hook(
            lambda *args: made.append(StorageWeakRef(args[-1].untyped_storage()))
        )
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_keeps_no_matrix(family, device):
    """Backward keeps no matrix: the saved bytes are fewer by the experts' matrices, and dequantized copies are freed."""
    (model, reference), ids = pair(family, device=device), IDS.to(device)
    made = watch(model)
    (loss, got), (_, expected) = (saved(lambda each=each: each(ids, labels=ids).loss) for each in (model, reference))
    assert expected - got == sum(getattr(module, name).nbytes for module, name in matrices_of(reference))
    made.clear()
    loss = model(ids, labels=ids).loss
    assert made
    assert all(storage.expired() for storage in made)
    loss.backward()
    assert all(storage.expired() for storage in made)


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized_once(family):
    """A matrix is dequantized once in a forward pass and once in backward, although it is read more often."""
    model = adapted(family)
    quantize_experts(model)
    made, matrices = watch(model), len(matrices_of(model))
    made.clear()
    loss = model(IDS, labels=IDS).loss
    assert len(made) == matrices
    loss.backward()
    assert len(made) == 2 * matrices


def test_within_other_hooks():
    """Outer hooks on saved tensors see every saved tensor except the matrices."""
    model, reference = pair("moe", torch.float32)
    expected, packed = results(reference), []
    with saved_tensors_hooks(lambda tensor: packed.append(tensor.clone()) or len(packed), lambda n: packed[n - 1]):
        assert_equal(results(model), expected)
    assert packed
    assert not any(each.shape == getattr(module, name).shape for each in packed for module, name in matrices_of(model))


def test_checkpointing_keeps_no_states(monkeypatch):
    """Checkpointing still drops the tensors that the experts save beside their matrices."""
    model = adapted("moe").train()
    quantize_experts(model)
    states, operator = [], interface.experts

    def spy(*arguments):
        output = operator(*arguments)
        states.append(StorageWeakRef(output[1].untyped_storage()))
        return output

    monkeypatch.setattr(interface, "experts", spy)
    loss = model(IDS, labels=IDS).loss
    assert len(states) == 2
    assert not any(storage.expired() for storage in states)
    del loss
    states.clear()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(IDS, labels=IDS).loss
    assert len(states) == 2
    assert all(storage.expired() for storage in states)
    loss.backward()
    assert len(states) == 4


def test_decoding_and_generation(device):
    model, reference = pair("mixtral", device=device)
    prompt = {"input_ids": IDS[:, :4].to(device), "max_new_tokens": 6, "do_sample": False}
    assert model.eval().generate(**prompt).equal(reference.eval().generate(**prompt))


def test_autocast():
    model, reference = pair("moe")
    for each in (model, reference):
        each.float()
    assert experts_of(model)[0].down_proj.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(results(model), results(reference))
        (_, got), (_, expected) = (saved(lambda e=each: e(IDS, labels=IDS).loss) for each in (model, reference))
    # under autocast backward keeps the bf16 copies of fp32 matrices
    assert expected - got == sum(getattr(module, name).nbytes for module, name in matrices_of(model))


def test_adapters(tmp_path):
    """An adapter trained in 4 bits gives equal logits when loaded in 4 bits, and merges into the 16-bit model."""
    model = adapted("mixtral", torch.float32)
    quantize_experts(model)
    train(model)
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("mixtral"), tmp_path, is_trainable=True)
    assert any(each.requires_grad for each in again.parameters())
    quantize_experts(again)
    assert again(IDS).logits.equal(logits)
    whole = PeftModel.from_pretrained(build("mixtral"), tmp_path)
    expected = whole(IDS).logits
    torch.testing.assert_close(whole.merge_and_unload()(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_several_adapters():
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=TARGETS)
    models = []
    for _ in range(2):
        model = get_peft_model(build("mixtral"), config)
        model.add_adapter("other", config)
        fill(model, 0.2, only="lora_")
        models.append(model)
    model, reference = models
    quantize_experts(model)
    with torch.no_grad():
        for (module, name), (other, _) in zip(matrices_of(model), matrices_of(reference), strict=True):
            getattr(other, name).copy_(getattr(module, name))
    for active in ("other", ["default", "other"]):
        for each in models:
            each.base_model.set_adapter(active)
        assert_equal(results(model), results(reference))
    with model.disable_adapter(), reference.disable_adapter():
        assert model(IDS).logits.equal(reference(IDS).logits)


def test_without_adapters_on_experts():
    """LoRA on attention alone needs the gradient through the frozen experts."""
    model = build("mixtral").bfloat16()
    quantize_experts(model)
    model = get_peft_model(model, moe_lora_config(model, r=2, experts=False))
    made = watch(model)
    loss = model(IDS, labels=IDS).loss
    assert all(storage.expired() for storage in made)
    loss.backward()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad.any()


def test_copies_and_devices():
    model = adapted("moe")
    quantize_experts(model)
    expected = results(model)
    other = copy.deepcopy(model)
    quantization_state = experts_of(other)[0].parametrizations["down_proj"][0].quant_state
    quantization_state.absmax.zero_()
    assert_equal(results(model), expected)
    assert not results(other)["logits"].equal(expected["logits"])
    made = watch(other)
    other(IDS, labels=IDS).loss.backward()
    assert len(made) == 2 * len(matrices_of(other))
    assert all(storage.expired() for storage in made)
    other.to("meta")
    assert all(getattr(module, name).is_meta for module, name in matrices_of(other))
    assert quantization_state.absmax.is_meta


def test_memory_of_the_matrices():
    """A number takes 4 bits, each 64 numbers an 8-bit scale, and each 256 scales 32 bits; two tables are small."""
    model = MoEForCausalLM(
        MoEConfig(hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    )
    numbers = sum(getattr(module, name).numel() for module, name in matrices_of(model))
    quantize_experts(model)
    state, module = experts_of(model)[0].state_dict(), experts_of(model)[0]
    assert not [parameter for parameter in module.parameters() if parameter.dtype != torch.uint8]
    tables = 2 * 4 * (16 + 256)
    small = sum(tensor.nbytes for name, tensor in state.items() if "quant_state" in name)
    assert sum(tensor.nbytes for tensor in state.values()) - small - tables == numbers * (1 / 2 + 1 / 64 + 1 / 4096)


def test_mistakes(tmp_path, monkeypatch):
    model = adapted("mixtral")
    model.save_pretrained(tmp_path)
    quantize_experts(model)
    with pytest.raises(UserError, match="in 4 bits: to merge, load the 16-bit model"):
        model.merge_and_unload()
    with pytest.raises(UserError, match="in 4 bits: to merge, load the 16-bit model"):
        model.merge_adapter()
    with pytest.raises(UserError, match="that have adapters are not saved"):
        model.get_base_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not in 4 bits already"):
        quantize_experts(model)
    for wrong, message in (
        (model_of("moe", hidden_act="quick_gelu"), "has no derivative here"),
        (build("mixtral", attn_implementation="eager", experts_implementation="eager"), "is 'eager', load the model"),
        (build("mixtral").double(), "is torch.float64 on cpu"),
        (build("mixtral").to("meta"), "on meta: load it"),
        (torch.nn.Linear(2, 2), "model has no experts"),
    ):
        with pytest.raises(UserError, match=message):
            quantize_experts(wrong)
    with pytest.raises(UserError, match="quant_type is 'int4'"):
        quantize_experts(build("mixtral"), quant_type="int4")
    with monkeypatch.context() as old:
        old.setattr(bitsandbytes, "__version__", "0.49.2")
        with pytest.raises(UserError, match="for a newer one"):
            quantize_experts(build("mixtral"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.parametrize", None)
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        quantize_experts(build("mixtral"))


def test_not_left_to_peft():
    """Experts in 4 bits that this package cannot serve are refused, since PEFT's own path does not support them."""
    model = adapted("mixtral")
    quantize_experts(model)
    model.base_model.model.set_experts_implementation("eager")
    with pytest.raises(UserError, match="is 'eager', load the model"):
        model(IDS)
    assert all(len(module.parametrizations[name]) == 1 for module, name in matrices_of(model))


def test_compiles_whole():
    model = adapted("mixtral")
    quantize_experts(model)
    expected = results(model)
    torch.compiler.reset()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, labels=IDS)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.pop("logits"), atol=0, rtol=0)
    gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert_equal(gradients, expected)
