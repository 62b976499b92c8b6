# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Tests that the presets in configuration/models load, have declared keys only, and are as large as the named models."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.configuration_fields import settings_of
from modeling_moe.conversion.importing import moe_config


FOLDER = Path(__file__).parents[2] / "configuration"
FILES = sorted((FOLDER / "models").glob("*.json"))
PRESET = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

# total and active parameters as published; the last two models are the package's
OURS = {"moe_tiny", "dynamic_k"}
PUBLISHED = {
    "switch_base_128": ("7.4B", "0.2B"),
    "glam_64b_64e": ("1.2T", "96.6B"),
    "mixtral_8x7b": ("46.7B", "12.9B"),
    "deepseek_moe_16b": ("16.4B", "2.8B"),
    "deepseek_v3": ("671B", "37B"),
    "olmoe_1b_7b": ("6.9B", "1.3B"),
    "qwen3_30b_a3b": ("30.5B", "3.3B"),
    "gpt4_rumour": ("1.8T", "280B"),
    "moe_tiny": ("317K", "169K"),
    "dynamic_k": ("318K", "220K"),
}
# Qwen rounds 3.353B down to 3.3B, and DeepSeek 37.55B to 37B
ROUNDED_DOWN = {("qwen3_30b_a3b", "3.3B"), ("deepseek_v3", "37B")}
TRAINING = ("router_bias_update_rate", "router_controller", "router_aux_loss_coef", "router_seq_aux_loss_coef")
REFERENCES = {
    "mixtral_8x7b": (MixtralConfig, MixtralForCausalLM),
    "olmoe_1b_7b": (OlmoeConfig, OlmoeForCausalLM),
    "qwen3_30b_a3b": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def last_digit(figure: str) -> tuple[float, float]:
    """Returns the value of a printed figure and the value of one unit in its last digit."""
    number, scale = figure[:-1], {"K": 1e3, "B": 1e9, "T": 1e12}[figure[-1]]
    return float(number) * scale, 10.0 ** -len(number.partition(".")[2]) * scale


def test_presets_are_the_ones_listed():
    assert {file.stem for file in FILES} == set(PUBLISHED)


@PRESET
def test_loads_as_written(file):
    preset, config = json.loads(file.read_text()), AutoConfig.from_pretrained(file)
    assert isinstance(config, MoEConfig)
    assert {name: getattr(config, name) for name in preset} == preset
    assert config.architectures == ["MoEForCausalLM"]


@PRESET
def test_keys_are_declared_fields(file):
    unknown = set(json.loads(file.read_text())) - set(settings_of(MoEConfig)) - {"model_type", "architectures"}
    assert not unknown


@PRESET
def test_parameter_arithmetic_matches_the_model(file):
    config = AutoConfig.from_pretrained(file)
    model = on_meta(MoEForCausalLM, config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    unused, remainder = divmod(experts * (config.num_experts - config.num_experts_per_tok), config.num_experts)
    assert remainder == 0
    assert (config.num_params(), config.num_active_params()) == (total, total - unused)


@PRESET
def test_rounds_to_the_published_figures(file):
    config = AutoConfig.from_pretrained(file)
    counts = (config.num_params(), config.num_active_params())
    for count, figure in zip(counts, PUBLISHED[file.stem], strict=True):
        value, unit = last_digit(figure)
        if (file.stem, figure) in ROUNDED_DOWN:
            assert 0 <= count - value < unit, f"{count:,} is not {figure}, rounded down"
        else:
            assert abs(count - value) <= unit / 2, f"{count:,} is not {figure}"


@pytest.mark.parametrize("name", REFERENCES)
def test_as_large_as_transformers_own(name):
    config_class, model_class = REFERENCES[name]
    file = FOLDER / "models" / f"{name}.json"
    preset = json.loads(file.read_text())
    del preset["model_type"]
    reference = on_meta(model_class, config_class(**preset))
    total = sum(parameter.numel() for parameter in reference.parameters())
    assert total == AutoConfig.from_pretrained(file).num_params()


def test_deepseek_v3_is_what_its_published_configuration_imports_as():
    """The preset equals `config.json` of deepseek-ai/DeepSeek-V3, except for fields that no model computes with."""
    published = DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_shared_experts=1,
        n_routed_experts=256,
        routed_scaling_factor=2.5,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=128,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        norm_topk_prob=True,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        rope_theta=10000,
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        bos_token_id=0,
        eos_token_id=1,
    )
    preset = AutoConfig.from_pretrained(FOLDER / "models" / "deepseek_v3.json")
    # the paper and not that file says how the model is trained
    training = {name: getattr(preset, name) for name in TRAINING}
    imported = MoEConfig(**{name: getattr(moe_config(published), name) for name in settings_of(MoEConfig)} | training)
    imported.rope_parameters.pop("type", None)
    for name in settings_of(MoEConfig):
        assert getattr(preset, name) == getattr(imported, name), name


def test_readme_states_the_computed_numbers():
    rows = {}
    for line in (FOLDER / "README.md").read_text().splitlines():
        if match := re.match(r"\| `(\w+)` \|", line):
            rows[match[1]] = [cell.strip() for cell in line.strip("| ").split("|")]
    assert set(rows) == {file.stem for file in FILES}
    for file in FILES:
        config = AutoConfig.from_pretrained(file)
        _, layers, routing, total, active, published = rows[file.stem][:6]
        assert layers == f"{config.num_hidden_layers}, {config.mlp_layer_types.count('sparse')} sparse"
        shared = f" + {config.num_shared_experts} shared" if config.num_shared_experts else ""
        assert routing == f"{config.num_experts} / {config.num_experts_per_tok}{shared}"
        assert (total, active) == (f"{config.num_params():,}", f"{config.num_active_params():,}")
        if file.stem not in OURS:
            assert published == " / ".join(PUBLISHED[file.stem])
