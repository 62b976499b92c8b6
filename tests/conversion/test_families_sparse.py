"""Mixture-of-Experts families are imported with equal logits, router logits and text, from memory and from disk."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models import deepseek_v2, deepseek_v3, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_moe
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from modeling_moe import MoEConfig
from modeling_moe.conversion.families.catalogue import SPARSE_FAMILIES
from modeling_moe.utils.errors import UserError
from tests.conversion import harness
from tests.conversion.harness import LATENT, SIZE, YARN, imported, lazy, moe_config


EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3}
QWEN = SIZE | EXPERTS | {"moe_intermediate_size": 24}
# DeepSeek-MoE-16B has these fields in config.json; transformers has no class for it
DEEPSEEK = SIZE | {
    "model_type": "deepseek",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.002,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
}

CONFIGS = {
    "mixtral": mixtral.MixtralConfig(**SIZE, num_local_experts=5, num_experts_per_tok=3, head_dim=12),
    "mixtral-window": mixtral.MixtralConfig(**SIZE, num_local_experts=5, num_experts_per_tok=3, sliding_window=4),
    "mixtral-tied": mixtral.MixtralConfig(**SIZE, num_local_experts=4, tie_word_embeddings=True),
    "qwen2_moe": qwen2_moe.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20, decoder_sparse_step=2),
    "qwen2_moe-window": qwen2_moe.Qwen2MoeConfig(
        **QWEN,
        shared_expert_intermediate_size=20,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        qkv_bias=False,
        norm_topk_prob=True,
    ),
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig(**QWEN, head_dim=12, mlp_only_layers=[1], max_window_layers=3),
    "qwen3_moe-renormalised": qwen3_moe.Qwen3MoeConfig(
        **QWEN, norm_topk_prob=True, attention_bias=True, use_sliding_window=True, sliding_window=4
    ),
    "olmoe": olmoe.OlmoeConfig(**SIZE, **EXPERTS, clip_qkv=0.5),
    "olmoe-renormalised": olmoe.OlmoeConfig(**SIZE, **EXPERTS, norm_topk_prob=True),
    "deepseek": PreTrainedConfig.from_dict(DEEPSEEK),
    "deepseek-bare": PreTrainedConfig.from_dict(
        DEEPSEEK | {"n_shared_experts": None, "attention_bias": True, "seq_aux": False, "moe_layer_freq": 2}
    ),
    "deepseek-scaled": PreTrainedConfig.from_dict(DEEPSEEK | {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "deepseek_v2": deepseek_v2.DeepseekV2Config(**LATENT, q_lora_rank=None),
    "deepseek_v2-groups": deepseek_v2.DeepseekV2Config(
        **LATENT,
        q_lora_rank=7,
        attention_bias=True,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": deepseek_v3.DeepseekV3Config(
        **LATENT, q_lora_rank=7, n_group=3, topk_group=2, rope_parameters=YARN | {"mscale": 0.8, "mscale_all_dim": 1.0}
    ),
    "deepseek_v3-bare": deepseek_v3.DeepseekV3Config(
        **LATENT, q_lora_rank=None, n_group=1, topk_group=1, attention_bias=True, norm_topk_prob=False
    ),
    "gpt_oss": gpt_oss.GptOssConfig(
        **SIZE,
        num_local_experts=5,
        num_experts_per_tok=3,
        head_dim=12,
        sliding_window=4,
        swiglu_limit=0.7,
        swiglu_alpha=1.3,
        rope_parameters=YARN | {"truncate": False},
    ),
    "gpt_oss-tied": gpt_oss.GptOssConfig(
        **SIZE,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
}


def deepseek_model(config) -> LlamaForCausalLM:
    """Builds DeepSeek-MoE from transformers' parts: a Llama with the sparse block of DeepSeek-V2."""
    values = {name: value for name, value in config.to_dict().items() if name in LlamaConfig.__annotations__}
    if config.rope_parameters is None:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    model = LlamaForCausalLM(LlamaConfig(**values))
    block = deepseek_v2.DeepseekV2Config(
        **{name: getattr(config, name) for name in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok")},
        n_routed_experts=config.n_routed_experts,
        n_shared_experts=config.n_shared_experts or 0,
    )
    for index, layer in enumerate(model.model.layers):
        if index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
            layer.mlp = DeepseekV2Moe(block)
            for parameter in layer.mlp.parameters():
                nn.init.normal_(parameter, std=config.initializer_range)
            if not config.n_shared_experts:
                layer.mlp.shared_experts = nn.Identity()
                layer.mlp.shared_experts.forward = torch.zeros_like
    return model


def random_source(name: str):
    """Returns a source model in which every parameter and each router's correction bias is random, and a configuration."""
    config = copy.deepcopy(CONFIGS[name])
    model = (
        harness.randomised(deepseek_model(config))
        if config.model_type == "deepseek"
        else harness.random_source(config)
    )
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":
            # older releases of transformers have constants instead of these fields
            module.limit = getattr(config, "swiglu_limit", module.limit)
            module.alpha = getattr(config, "swiglu_alpha", module.alpha)
    return model, config


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("deepseek-")])
def test_from_disk(name, tmp_path):
    source, config = random_source(name)
    tensors = harness.check_disk(source, config, tmp_path)
    assert any(".experts.0." in key for key in tensors) != (config.model_type in ("gpt_oss", "deepseek"))


def test_deepseek_from_disk():
    source, config = random_source("deepseek")
    tensors = source.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        prefix, fused = name.removesuffix("gate_up_proj").removesuffix("down_proj"), tensors.pop(name)
        names = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        for expert in range(config.n_routed_experts):
            for part, weight in zip(names, fused[expert].chunk(len(names)), strict=True):
                tensors[f"{prefix}{expert}.{part}.weight"] = weight
    ids = torch.randint(3, 99, (2, 9))
    got = imported(config, lazy(tensors))(ids).logits
    torch.testing.assert_close(got, source(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe-renormalised", "olmoe", "deepseek_v3", "deepseek_v3-bare", "gpt_oss"]
)
def test_bf16_is_bitwise(name, tmp_path):
    # DeepSeek-V2 is left out because it rotates with complex numbers in fp32
    got, expected = harness.bf16_outputs(random_source(name)[0], tmp_path)
    if name == "gpt_oss":
        # transformers' gpt-oss rounds a product before it adds the bias, so only layers before the first experts are equal
        assert torch.equal(got.router_logits[0], expected.router_logits[0])
    else:
        assert torch.equal(got.logits, expected.logits)


def test_yarn_scales_of_deepseek():
    for name in ("deepseek_v2-groups", "deepseek_v3", "deepseek_v3-bare"):
        source, config = random_source(name)
        model = imported(config, lazy(source.state_dict()))
        assert model.model.layers[0].self_attn.scaling == source.model.layers[0].self_attn.scaling
    assert moe_config(CONFIGS["deepseek_v3-bare"]).attention_multiplier is None


def test_balance_losses():
    """DeepSeek's first loss is 1 in balance and ours K, so the coefficient is divided; transformers' is kept."""
    first, batch = moe_config(CONFIGS["deepseek"]), moe_config(CONFIGS["deepseek-bare"])
    assert (first.router_aux_loss_coef, first.router_aux_loss_scope) == (0.002 / 3, "sequence")
    assert (batch.router_aux_loss_coef, batch.router_aux_loss_scope) == (0.002 / 3, "batch")
    config = copy.deepcopy(CONFIGS["deepseek_v3"])
    config.aux_loss_alpha, config.seq_aux = 0.001, True
    third = moe_config(config)
    assert (third.router_aux_loss_coef, third.router_seq_aux_loss_coef) == (0.0, 0.001)
    plain = moe_config(mixtral.MixtralConfig(router_aux_loss_coef=0.02))
    assert (plain.router_aux_loss_coef, plain.router_z_loss_coef) == (0.02, 0.0)


@pytest.mark.parametrize(("experts", "renormalised"), [(3, True), (1, False)])
def test_deepseek_renormalises_more_than_one_weight(experts, renormalised):
    config = PreTrainedConfig.from_dict(DEEPSEEK | {"norm_topk_prob": True, "num_experts_per_tok": experts})
    assert moe_config(config).norm_topk_prob is renormalised


def test_correction_bias_stays_fp32():
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    state = lazy({name: torch.randn(6).to(torch.bfloat16)})
    bias = SPARSE_FAMILIES["deepseek_v3"].tensors(state, moe_config(CONFIGS["deepseek_v3"]))[name]
    assert bias.dtype == bias.read().dtype == torch.float32


def test_mxfp4_experts():
    """Experts dequantised one by one equal transformers' dequantisation of all, and the model has these experts."""
    config = gpt_oss.GptOssConfig(
        **SIZE | {"hidden_size": 96, "intermediate_size": 32}, num_local_experts=3, num_experts_per_tok=2, head_dim=8
    )
    source = AutoModelForCausalLM.from_config(config).eval()
    tensors, packed = source.state_dict(), {}
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        _, columns, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (3, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, (3, rows, columns // 32), dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name].copy_(convert_moe_packed_tensors(blocks, scales))
    rest = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in packed}
    state, prefix = lazy(rest | packed), "model.layers.1.mlp.experts."
    ours = SPARSE_FAMILIES["gpt_oss"].tensors(state, moe_config(config))
    for expert in range(3):
        gate, up, down = (ours[f"{prefix}{expert}.{part}_proj.weight"].read() for part in ("gate", "up", "down"))
        assert gate.dtype == torch.bfloat16
        assert torch.equal(gate.float(), tensors[f"{prefix}gate_up_proj"][expert, :, 0::2].T)
        assert torch.equal(up.float(), tensors[f"{prefix}gate_up_proj"][expert, :, 1::2].T)
        assert torch.equal(down.float(), tensors[f"{prefix}down_proj"][expert].T)
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(imported(config, state)(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)


# fields in config.json files on the Hub that transformers' classes do not declare
PUBLISHED = {
    "qwen3_moe": {"max_window_layers": 48},
    "deepseek_v2": {
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "pretraining_tp": 1,
    },
    "deepseek_v3": {
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    "gpt_oss": {
        "experts_per_token": 3,
        "initial_context_length": 4096,
        "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_checkpoints(name):
    config = copy.deepcopy(CONFIGS[name])
    for field, value in PUBLISHED[name].items():
        setattr(config, field, value)
    assert moe_config(config).num_params() == AutoModelForCausalLM.from_config(CONFIGS[name]).num_parameters()


def test_unknown_field_is_refused_where_transformers_has_no_class():
    config = copy.deepcopy(CONFIGS["deepseek"])
    config.secret_gate = 0.5
    with pytest.raises(UserError, match=r"secret_gate .* of this deepseek model is unknown"):
        moe_config(config)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mixtral", "quantization_config", {"quant_method": "awq"}),
        ("deepseek", "scoring_func", "sigmoid"),
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "mlp_bias", True),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "rope_interleave", False),
        ("deepseek_v3", "seq_aux", False),
        ("deepseek_v3", "quantization_config", {"quant_method": "mxfp4"}),
        ("gpt_oss", "quantization_config", {"quant_method": "fp8"}),
        ("gpt_oss", "hidden_act", "gelu"),
        ("gpt_oss", "experts_per_token", 2),
    ],
)
def test_unsupported_values_are_refused(name, field, value):
    config = copy.deepcopy(CONFIGS[name])
    moe_config(config)
    setattr(config, field, value)
    with pytest.raises(UserError, match=field):
        moe_config(config)


def test_latent_attention_without_widths_is_refused():
    with pytest.raises(UserError, match="kv_lora_rank, qk_nope_head_dim and qk_rope_head_dim must be set"):
        SPARSE_FAMILIES["deepseek_v2"].tensors({}, MoEConfig())


def test_head_that_differs_from_the_embedding_is_refused():
    source, config = random_source("mixtral-tied")
    tensors = source.state_dict() | {"lm_head.weight": torch.zeros(99, 32)}
    with pytest.raises(UserError, match="tie_word_embeddings is true"):
        imported(config, lazy(tensors))
