# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Cards of transformers' own MoE models, of exports and of adapters: their facts come from configurations and interfaces."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from modeling_moe import MoEForCausalLM
from modeling_moe.conversion import TARGETS
from modeling_moe.conversion.targets.servers import SERVED
from modeling_moe.hub import write_model_card
from modeling_moe.hub.serving import exports, servers, unfit_servers
from tests.builders import tiny_config, train_tokenizer


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
# configuration, and what the card must say about the router
FAMILIES: dict[str, tuple[PreTrainedConfig, dict[str, str]]] = {
    "mixtral": (
        MixtralConfig(num_key_value_heads=2, num_local_experts=6, **SHAPE),
        {"Router": "`topk` on softmax scores, weights divided by their sum", "Routed experts": "6 of width 24"},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(num_key_value_heads=2, head_dim=8, norm_topk_prob=True, **SHAPE, **EXPERTS),
        {"Router": "`topk` on softmax scores, weights divided by their sum", "Routed experts": "6 of width 16"},
    ),
    "olmoe": (
        OlmoeConfig(num_key_value_heads=4, num_experts=6, num_experts_per_tok=2, **SHAPE),
        {"Router": "`topk` on softmax scores", "Router losses in training, by weight": "load balance 0.01, if `output_router_logits` is true"},
    ),
    "gpt_oss": (
        GptOssConfig(num_key_value_heads=2, head_dim=8, num_local_experts=6, num_experts_per_tok=2, **SHAPE),
        {"Experts per token": "2", "Other settings": "`router_bias=yes`"},
    ),
    "deepseek_v3": (
        DeepseekV3Config(
            n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16,
            first_k_dense_replace=1, pad_token_id=0, **SHAPE | {"num_key_value_heads": 4}, **LATENT,
        ),
        {"Routed experts": "6 of width 16", "Shared experts": "1, of width 16"},
    ),
}  # fmt: skip


def rows(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, flags=re.M))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_card_of_transformers_own_model(name, tmp_path, monkeypatch):
    config, expected = FAMILIES[name]
    model, folder = AutoModelForCausalLM.from_config(config), tmp_path / name
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    card = write_model_card(folder)
    told = rows(card)
    assert told | expected == told
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for key, parameter in model.named_parameters() if ".mlp.experts." in key)
    active = total - routed * 4 // 6
    assert told["Total parameters"] == f"{total:,}"
    assert told["Active parameters per token"].startswith(f"{active:,} (")
    assert (card.data.tags, card.data.library_name, card.data.pipeline_tag) == (
        ["moe"],
        "transformers",
        "text-generation",
    )
    assert f"in the format `{name}`" in card.text
    assert "transformers serve" in card.text
    (block,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    assert "modeling_moe" not in block
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert type(names["model"]) is type(model)


def test_a_family_without_a_conversion_is_described_by_shared_names(tmp_path):
    """DeepSeek-V3.2 has no conversion here: the facts come from the experts interface and transformers' names."""
    values = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    config = AutoConfig.for_model(
        "deepseek_v32",
        num_key_value_heads=4,
        n_group=1,
        topk_group=1,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        pad_token_id=0,
        **values,
        **LATENT,
        **SHAPE,
    )
    config.architectures = ["DeepseekV32ForCausalLM"]
    config.save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    told = rows(card)
    # older releases of transformers declare no router of this family
    assert told.get("Router", "`DeepseekV32TopkRouter` of transformers") == "`DeepseekV32TopkRouter` of transformers"
    assert (told["Routed experts"], told["Experts per token"], told["Shared experts"]) == ("4", "2", "1")
    assert told["Factor on the weights"] == "2.5"
    assert told["Layers"] == "2, of which 1 sparse"
    assert "llama.cpp" not in card.text


def test_a_card_names_the_server_that_does_not_read_the_format(tmp_path):
    values = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    config = AutoConfig.for_model("glm4_moe", num_key_value_heads=2, head_dim=8, **values, **SHAPE)
    config.save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert "vllm serve" in card.text
    assert "- llama.cpp converts only checkpoints with GLM's own tokenizer." in card.text
    assert "llama-server" not in card.text


def test_a_dense_model_of_transformers_is_no_moe(tmp_path):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert "tags" not in card.data.to_dict()
    assert "Mixture-of-Experts language" not in card.text
    assert "## Router" not in card.text


def names(found) -> list[str]:
    return [server.name for server in found]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MixtralConfig(), ["vLLM", "llama.cpp", "transformers"]),
        (MixtralConfig(sliding_window=64), ["vLLM", "transformers"]),
        (MixtralConfig(hidden_act="gelu"), ["transformers"]),
        (Qwen3MoeConfig(norm_topk_prob=True), ["vLLM", "llama.cpp", "transformers"]),
        (Qwen3MoeConfig(norm_topk_prob=False), ["vLLM", "transformers"]),
        (Qwen3MoeConfig(norm_topk_prob=True, attention_bias=True), ["transformers"]),
        (Qwen3MoeConfig(norm_topk_prob=True, mlp_only_layers=[0]), ["vLLM", "transformers"]),
        (OlmoeConfig(norm_topk_prob=True), ["transformers"]),
        (OlmoeConfig(norm_topk_prob=False), ["vLLM", "llama.cpp", "transformers"]),
        (GptOssConfig(), ["transformers"]),
        (GraniteMoeSharedConfig(), ["vLLM", "llama.cpp", "transformers"]),
        (GraniteMoeSharedConfig(attention_bias=True), ["llama.cpp", "transformers"]),
        (GraniteMoeSharedConfig(head_dim=64), ["transformers"]),
        (DeepseekV3Config(), ["vLLM, by its Transformers back end", "transformers"]),
        (
            DeepseekV3Config(scoring_func="sigmoid"),
            ["vLLM, by its Transformers back end", "llama.cpp", "transformers"],
        ),
    ],
)
def test_servers_of_native_formats(config, expected):
    """A server that was measured to answer wrongly for a value of a field is not named."""
    assert names(servers(config)) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MixtralConfig(), {}),
        (MixtralConfig(sliding_window=64, hidden_act="gelu"), {"vLLM": 1, "llama.cpp": 2}),
        (Qwen3MoeConfig(norm_topk_prob=False, mlp_only_layers=[0]), {"llama.cpp": 2}),
        (GptOssConfig(), {"vLLM": 1, "llama.cpp": 1}),
        (GptOssConfig(layer_types=["full_attention"] * 36), {"vLLM": 2, "llama.cpp": 2}),
    ],
)
def test_a_card_says_which_servers_do_not_compute_the_model(config, expected):
    assert {verdict.server.name: len(verdict.faults) for verdict in unfit_servers(config)} == expected


def test_a_card_needs_no_flag_where_the_plugin_serves(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    text = write_model_card(tmp_path).text
    (block,) = re.findall(r"```bash\n([^`]*vllm serve[^`]*)```", text.partition("`moe convert`")[0])
    assert "pip install --no-deps modeling-moe" in block
    assert "--trust-remote-code" not in block
    assert "--model-impl" not in block


def test_every_export_is_among_the_measured_formats():
    assert set(TARGETS) <= set(SERVED)


PLUGIN = "vLLM, with this package beside it"
OWN = [PLUGIN, "SGLang, by its Transformers back end"]


@pytest.mark.parametrize(
    ("fields", "by_code", "formats"),
    [
        ({"mlp_layer_types": ["sparse"] * 3, "norm_topk_prob": True}, OWN, ["mixtral"]),
        ({"scoring_func": "sigmoid"}, OWN, []),
        ({"scoring_func": "sigmoid", "mlp_layer_types": ["sparse"] * 3}, OWN, ["glm4_moe"]),
        ({"hidden_act": "gelu"}, [PLUGIN], []),
        ({"capacity_factor": 1.0, "eval_capacity_factor": 1.0}, [], []),
        ({"router_type": "expert_choice", "allow_noncausal": True}, [], []),
        ({"num_null_experts": 2}, [PLUGIN], []),
        ({"attention_sinks": True}, [], []),
        ({"moe_latent_size": 16}, [], []),
    ],
)
def test_servers_of_this_packages_model(fields, by_code, formats):
    """SGLang computes SiLU and plain routers only, vLLM all that the plugin serves; exports are those of `moe convert`."""
    config = tiny_config(**fields)
    assert names(servers(config)) == by_code
    assert set(formats) <= set(exports(config))
    if not formats:
        assert not exports(config)


@pytest.mark.parametrize("own", [True, False], ids=["base of this package", "base of transformers"])
def test_the_code_of_an_adapters_card_runs(own, tmp_path, monkeypatch):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    config = tiny_config(vocab_size=300) if own else FAMILIES["mixtral"][0]
    model = MoEForCausalLM(config) if own else AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    adapted = get_peft_model(type(model).from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    card = write_model_card(folder, base_model="owner/base")
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert data["tags"] == [*(["moe", "modeling_moe"] if own else []), "lora"]
    told = rows(card)
    size = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert (told["Rank"], told["Adapted layers"], told["Parameters of the adapter"]) == ("4", "q_proj", f"{size:,}")
    assert str(tmp_path) not in card.content
    (block,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    assert ("import modeling_moe" in block) == own
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert Path(names["model"].peft_config["default"].base_model_name_or_path) == base
