"""Checkpoints of transformers' models, imported: same logits, router logits and text."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import (
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)

from modeling_moe.cli import UserError
from modeling_moe.conversion import convert_checkpoint, moe_config, to_moe


SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3}
QWEN_EXPERTS = EXPERTS | {"moe_intermediate_size": 24}

SPARSE = {
    "mixtral": mixtral.MixtralConfig(**SIZE, num_local_experts=5, num_experts_per_tok=3, head_dim=12),
    "mixtral-window": mixtral.MixtralConfig(**SIZE, num_local_experts=5, num_experts_per_tok=3, sliding_window=4),
    "mixtral-tied": mixtral.MixtralConfig(**SIZE, num_local_experts=4, tie_word_embeddings=True),
    "qwen2_moe": qwen2_moe.Qwen2MoeConfig(
        **SIZE, **QWEN_EXPERTS, shared_expert_intermediate_size=20, decoder_sparse_step=2
    ),
    "qwen2_moe-window": qwen2_moe.Qwen2MoeConfig(
        **SIZE,
        **QWEN_EXPERTS,
        shared_expert_intermediate_size=20,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        qkv_bias=False,
        norm_topk_prob=True,
    ),
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig(**SIZE, **QWEN_EXPERTS, head_dim=12, mlp_only_layers=[1]),
    "qwen3_moe-renormalised": qwen3_moe.Qwen3MoeConfig(
        **SIZE, **QWEN_EXPERTS, norm_topk_prob=True, attention_bias=True, use_sliding_window=True, sliding_window=4
    ),
    "olmoe": olmoe.OlmoeConfig(**SIZE, **EXPERTS, clip_qkv=0.5),
    "olmoe-renormalised": olmoe.OlmoeConfig(**SIZE, **EXPERTS, norm_topk_prob=True),
}
DENSE = {
    "llama": llama.LlamaConfig(**SIZE, head_dim=12, attention_bias=True, mlp_bias=True),
    "llama-rope": llama.LlamaConfig(
        **SIZE,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": mistral.MistralConfig(**SIZE, sliding_window=4),
    "qwen2": qwen2.Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": qwen3.Qwen3Config(**SIZE, head_dim=12),
}


def random_source(config):
    """The source model with every parameter random, norms and biases too."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def padded_batch(side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (3, 9))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5)):
        columns = slice(0, padding) if side == "left" else slice(9 - padding, 9)
        ids[row, columns], mask[row, columns] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*SPARSE, *DENSE])
def test_same_logits(name, side):
    source = random_source((SPARSE | DENSE)[name])
    model = to_moe(source)
    batch = padded_batch(side)
    flag = {"output_router_logits": True} if name in SPARSE else {}
    expected, got = source(**batch, **flag), model(**batch, **flag)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    if name in SPARSE:
        assert len(got.router_logits) == model.config.mlp_layer_types.count("sparse")
        for mine, theirs in zip(got.router_logits, expected.router_logits, strict=True):
            torch.testing.assert_close(mine[real.flatten()], theirs[real.flatten()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*SPARSE, *DENSE])
def test_same_text_and_cached_decode(name):
    source = random_source((SPARSE | DENSE)[name])
    model = to_moe(source)
    batch = padded_batch("left")
    arguments = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    expected = source.generate(**batch, **arguments)
    assert torch.equal(model.generate(**batch, **arguments), expected)
    # the same tokens in one pass, without a cache
    whole = model(input_ids=expected[:1]).logits
    cache, steps = None, []
    for token in expected[0]:
        out = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[:, 0])
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe", "llama"])
def test_convert_checkpoint_round_trip(name, tmp_path):
    source = random_source((SPARSE | DENSE)[name])
    source.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    assert (tmp_path / "moe" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == "moe"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)
    assert model.generation_config.eos_token_id == source.generation_config.eos_token_id


def test_bf16_is_bitwise_the_dense_model(tmp_path):
    # through a file: `.to(bfloat16)` would round the source's rotary frequencies
    random_source(DENSE["llama"]).save_pretrained(tmp_path)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(3, 99, (2, 9))
    assert torch.equal(to_moe(source)(ids).logits, source(ids).logits)


def test_unknown_family_is_named(tmp_path):
    from transformers import BloomConfig

    with pytest.raises(UserError, match="model_type 'bloom' has no conversion: it must be one of deepseek, "):
        moe_config(BloomConfig())


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"model_name_or_path .* cannot be loaded"):
        convert_checkpoint(str(tmp_path / "nowhere"), tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_full_output_dir_is_refused(tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("1")
    with pytest.raises(UserError, match=r"output_dir .* is not empty"):
        convert_checkpoint("anything", tmp_path / "moe")
    assert (tmp_path / "moe" / "precious").read_text() == "1"
