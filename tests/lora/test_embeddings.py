# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These tests compare adapters on a scaled embedding (Gemma) with the merged and the reloaded model."""

import copy

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, OFTConfig, PeftModel, TrainableTokensConfig, get_peft_model

from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config


IDS = torch.arange(3, 21).view(2, 9)
LORA = {"r": 2, "init_lora_weights": False}
EMBEDDING = {
    "lora": LoraConfig(target_modules=["embed_tokens"], **LORA),
    "rslora": LoraConfig(target_modules=["embed_tokens", "q_proj"], use_rslora=True, **LORA),
    "dora": LoraConfig(target_modules=["embed_tokens"], use_dora=True, **LORA),
    "lora and head": LoraConfig(target_modules=["embed_tokens", "lm_head"], **LORA),
    "oft": OFTConfig(target_modules=["embed_tokens"], oft_block_size=4),
}
OTHERS = {
    "tokens": TrainableTokensConfig(token_indices=[3, 5, 7]),
    "lora and tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5, 7], **LORA),
    "whole embedding": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LORA),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}
CASES = [(name, False) for name in EMBEDDING | OTHERS] + [(name, True) for name in OTHERS]


def base(tied: bool) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(scale_embeddings=True, tie_word_embeddings=tied))


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_a_scaled_embedding_computes_the_same_adapted_merged_and_reloaded(name, tied, tmp_path):
    model = get_peft_model(base(tied), copy.deepcopy((EMBEDDING | OTHERS)[name]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        logits, plain = model(IDS).logits, base(tied).eval()(IDS).logits
        loaded = PeftModel.from_pretrained(base(tied), tmp_path).eval()(IDS).logits
        merged = model.merge_and_unload()(IDS).logits
    # an adapter without effect would pass the other assertions
    assert (logits - plain).abs().max() > 0.1
    assert torch.equal(loaded, logits)
    torch.testing.assert_close(merged, logits, atol=1e-5 * logits.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_is_what_peft_reads(dtype):
    embedding = base(False).to(dtype).model.embed_tokens
    expected = embedding.weight[IDS] * torch.tensor(32**0.5, dtype=dtype)
    assert torch.equal(embedding(IDS), expected)
    assert embedding.embed_scale == 32**0.5
