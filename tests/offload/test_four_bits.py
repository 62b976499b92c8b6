"""Experts of a checkpoint in 4 bits are read one by one, with the bits of the model that holds them all in 4 bits."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.lora import Experts4bitConfig, moe_lora_config
from modeling_moe.monitoring import experts_modules
from modeling_moe.offload import from_pretrained_offloaded, load_without_experts
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config
from tests.monitoring.moe_families import tiny_family


pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def model_of(family: str):
    torch.manual_seed(0)
    if family == "moe":
        return MoEForCausalLM(tiny_config(num_experts=6, moe_intermediate_size=32, initializer_range=0.2))
    return tiny_family(family)


def in_4bit(family: str, folder, **options):
    """Returns a folder in 4 bits, and the model that holds all of the folder's experts."""
    model_of(family).bfloat16().save_pretrained(folder / "16")
    model = AutoModelForCausalLM.from_pretrained(folder / "16", quantization_config=Experts4bitConfig(**options))
    model.save_pretrained(folder / "4")
    return folder / "4", AutoModelForCausalLM.from_pretrained(folder / "4", experts_implementation="moe").eval()


@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("family", ["moe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_and_logits_equal_those_of_the_model_in_4_bits(family, compress_statistics, tmp_path):
    folder, whole = in_4bit(family, tmp_path, compress_statistics=compress_statistics)
    _, stores = load_without_experts(folder)
    for name, store in stores.items():
        module = whole.get_submodule(name)
        for expert in range(store.num_experts):
            read = {part: torch.full(shape, torch.nan, dtype=dtype) for part, (shape, dtype) in store.parts.items()}
            store.read(expert, read)
            assert all(torch.equal(read[part], getattr(module, part)[expert]) for part in read)
    offloaded = from_pretrained_offloaded(folder, slots=3)
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, whole(IDS).logits)
    text = [model.generate(IDS[:1], max_new_tokens=5, do_sample=False) for model in (offloaded, whole)]
    assert torch.equal(*text)


def test_an_adapter_trains_on_experts_in_4_bits_on_disk(tmp_path):
    folder, whole = in_4bit("mixtral", tmp_path)
    gradients = []
    for model in (from_pretrained_offloaded(folder, slots=2), whole):
        torch.manual_seed(1)
        adapted = get_peft_model(model, moe_lora_config(model, r=2, router=False, quiet=True)).train()
        factors = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
        generator = torch.Generator().manual_seed(2)
        for _, value in sorted(factors.items()):
            value.data = torch.randn(value.shape, generator=generator).to(value.dtype) * 0.1
        adapted(IDS, labels=IDS).loss.backward()
        gradients.append({name: value.grad for name, value in factors.items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert gradient.abs().sum() > 0
        assert torch.equal(gradients[0][name], gradient), name


def test_the_rest_of_the_model_and_its_dtype(tmp_path):
    folder, _ = in_4bit("mixtral", tmp_path)
    found = load_without_experts(folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    store = next(iter(found.stores.values()))
    read = {part: torch.empty(shape, dtype=dtype) for part, (shape, dtype) in store.parts.items()}
    store.read(1, read)
    module = experts_modules(whole)[0]
    assert all(torch.equal(tensor, getattr(module, part)[1]) for part, tensor in read.items())
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    assert torch.equal(found.model.lm_head.weight, whole.lm_head.weight)


def test_what_cannot_be_read_is_refused(tmp_path):
    folder, _ = in_4bit("mixtral", tmp_path)
    with pytest.raises(UserError, match=r"is quantised \(modeling_moe_4bit\)"):
        from_pretrained_offloaded(folder, slots=2, tier="pinned")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.absmax"))
    save_file({key: value for key, value in tensors.items() if key != name.replace("absmax", "quant_map")}, file)
    with pytest.raises(UserError, match="cannot be read in 4 bits: only absmax"):
        from_pretrained_offloaded(folder, slots=2)
    save_file(tensors | {name: tensors[name][:-1]}, file)
    with pytest.raises(UserError, match="cannot be read in 4 bits: its number of scales is"):
        from_pretrained_offloaded(folder, slots=2)
    with pytest.raises(UserError, match="linear layers in 4 bits"):
        from_pretrained_offloaded(in_4bit("mixtral", tmp_path / "all", linear_layers=True)[0], slots=2)


def test_experts_that_share_a_scale_are_refused(tmp_path):
    model = MoEForCausalLM(tiny_config(hidden_size=32, num_attention_heads=4, moe_intermediate_size=5))
    model.bfloat16().save_pretrained(tmp_path / "16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "16", quantization_config=Experts4bitConfig())
    model.save_pretrained(tmp_path / "4")
    with pytest.raises(UserError, match="160 numbers are no multiple of 64"):
        from_pretrained_offloaded(tmp_path / "4", slots=3)
