"""Verification compares only cross entropy and logits, and refuses models with values that are not finite."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models import llama, mixtral, olmoe, qwen2_moe, qwen3_moe

from modeling_moe.conversion import convert_checkpoint, verify
from modeling_moe.conversion.verification import verification_ids
from modeling_moe.utils.errors import UserError
from tests.builders import train_tokenizer


SIZE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOUD = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
SOURCES = {
    "mixtral": mixtral.MixtralConfig(**SIZE, num_local_experts=4, **LOUD),
    "qwen2_moe": qwen2_moe.Qwen2MoeConfig(**SIZE, **EXPERTS, **LOUD),
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig(**SIZE, **EXPERTS, **LOUD),
    "olmoe": olmoe.OlmoeConfig(**SIZE, num_experts=4, num_experts_per_tok=2, **LOUD),
}


def save_source(config, folder):
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", SOURCES)
def test_the_router_loss_in_transformers_loss_is_no_difference(name, tmp_path):
    model = save_source(SOURCES[name], tmp_path / "source")
    verification = convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", check=True).verification
    ids = verification_ids(tmp_path / "source")
    with torch.no_grad():
        output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1].double(), ids[0, 1:])
    assert output.loss > expected + 0.5
    assert verification.source_loss == pytest.approx(expected.item(), abs=1e-5)
    assert verification.result_loss == pytest.approx(expected.item(), abs=1e-5)
    assert verification.largest_difference < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("damaged", ["source", "result"])
def test_verification_names_a_weight_that_is_not_finite(damaged, value, tmp_path):
    save_source(llama.LlamaConfig(**SIZE), tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "result")
    file = tmp_path / damaged / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight of .* holds NaN or infinity"):
        verify(tmp_path / "source", tmp_path / "result")


def test_logits_that_overflow_are_not_verified(tmp_path):
    model = AutoModelForCausalLM.from_config(llama.LlamaConfig(**SIZE)).to(torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(60000)
        model.model.norm.weight.fill_(60000)
    model.save_pretrained(tmp_path / "source")
    train_tokenizer().save_pretrained(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "result")
    with pytest.raises(UserError, match=r"logits of .* are not finite in torch\.float16: .* --dtype float32"):
        verify(tmp_path / "source", tmp_path / "result")


def test_a_missing_tokenizer_is_found_before_anything_is_written(tmp_path):
    AutoModelForCausalLM.from_config(llama.LlamaConfig(**SIZE)).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="tokenizer"):
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    save_source(llama.LlamaConfig(**SIZE | {"vocab_size": 100}), tmp_path / "source")
    with pytest.raises(UserError, match=r"the tokenizer has a token \d+ and .* an embedding of 100"):
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", check=True)
