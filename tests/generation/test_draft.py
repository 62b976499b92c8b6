# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A draft model changes no greedy text and no distribution of samples; what would change is refused by name."""

import json

import pytest
import torch
import transformers
from packaging import version
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from modeling_moe import MoEForCausalLM
from modeling_moe.generation import Draft, Writer, dense_source, fit_draft, reason_not_exact, write
from modeling_moe.generation.draft import refuse_draft_window, refuse_other_tokens
from modeling_moe.utils.errors import UserError
from tests.builders import SIZE, tiny_config, train_tokenizer
from tests.core.test_catalogue import ALL, batch_of, model_of


OLD = version.parse(transformers.__version__) < version.parse("5.24")
PROMPT = torch.tensor([[5, 17, 44, 8, 23, 60]])
WINDOWS = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}


def dense(**fields) -> LlamaForCausalLM:
    """Returns a dense model with 1 layer, whose proposals are mostly wrong."""
    return LlamaForCausalLM(LlamaConfig(**(SIZE | {"num_hidden_layers": 1} | fields))).eval()


def greedy(new: int, **fields) -> GenerationConfig:
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return GenerationConfig(**(settings | fields))


def drafted(model, draft, config, ids=PROMPT) -> torch.Tensor:
    fit_draft(draft, model, 3)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, assistant_model=draft)


def plain(model, config, ids=PROMPT) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def calls_of(model, name: str, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the logits of the last 8 tokens, given in calls of `size` tokens after the others; after each call of several, a wrong token is given and forgotten."""
    cache, tasks = DynamicCache(config=model.config), batch_of(name, ids)
    tasks.pop("input_ids")
    cache.activate_past_recording()
    model(ids[:, :-8], past_key_values=cache, **tasks)
    logits = []
    for start in range(ids.shape[1] - 8, ids.shape[1], size):
        part = ids[:, start : start + size]
        given = torch.cat([part, part[:, :1]], dim=1) if size > 1 else part
        logits.append(model(given, past_key_values=cache, **tasks).logits[:, :size])
        if size > 1:
            cache.crop(-1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ALL)
def test_a_draft_is_refused_exactly_where_the_tokens_of_a_call_change_each_other(name):
    model = model_of(name).double().eval()
    equal = []
    for seed in range(4):
        ids = torch.randint(3, 99, (1, 14), generator=torch.Generator().manual_seed(seed))
        one, several = calls_of(model, name, ids, 1), calls_of(model, name, ids, 4)
        equal.append(torch.allclose(one, several, atol=1e-9))
    reason = reason_not_exact(model, greedy(8), 14)
    assert all(equal) == (reason is None), reason


@pytest.mark.parametrize(
    "fields",
    [{}, WINDOWS, LATENT, {"num_shared_experts": 1, "qk_norm": "head"}],
    ids=["plain", "windows", "latent", "shared"],
)
def test_the_greedy_text_is_the_models_own(fields):
    model = MoEForCausalLM(tiny_config(**fields)).eval()
    config = greedy(24)
    assert reason_not_exact(model, config, PROMPT.shape[1]) is None
    expected = plain(model, config)
    assert torch.equal(drafted(model, dense(), config), expected)
    if fields is WINDOWS and OLD:
        return  # transformers cannot crop the draft model's cache
    assert torch.equal(drafted(model, model.__class__(model.config).eval(), config), expected)


@pytest.mark.parametrize(
    ("release", "tokens", "refused"), [("5.17.0", 5, True), ("5.17.0", 4, False), ("5.24.0", 5, False)]
)
def test_a_window_of_the_draft_is_refused_where_transformers_cannot_crop_it(release, tokens, refused, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", release)
    refuse_draft_window(Draft("dense", dense()), tokens)
    windowed = Draft("windowed", MoEForCausalLM(tiny_config(**WINDOWS)).eval())
    if refused:
        with pytest.raises(UserError, match="a sliding window of 4 tokens, shorter than the text of 5"):
            refuse_draft_window(windowed, tokens)
    else:
        refuse_draft_window(windowed, tokens)


def test_a_window_of_transformers_own_model_is_cropped():
    model = MistralForCausalLM(MistralConfig(**SIZE, sliding_window=4)).eval()
    config = greedy(24)
    assert torch.equal(drafted(model, dense(), config), plain(model, config))


def test_a_bf16_text_differs_only_where_two_tokens_are_equally_likely():
    """In bf16 a call of several tokens rounds otherwise than calls of one, so that a tie can fall to the other token."""
    model = MoEForCausalLM(tiny_config()).eval().to(torch.bfloat16)
    for seed in range(4):
        ids = torch.randint(3, 99, (1, 6), generator=torch.Generator().manual_seed(seed))
        expected, text = (
            plain(model, greedy(24), ids)[0],
            drafted(model, dense().to(torch.bfloat16), greedy(24), ids)[0],
        )
        shared = min(len(expected), len(text))
        differs = (expected[:shared] != text[:shared]).nonzero()
        if len(differs):
            at = int(differs[0])
            logits = model.float()(expected[None, :at]).logits[0, -1]
            model.to(torch.bfloat16)
            assert (logits[expected[at]] - logits[text[at]]).abs() < 0.03 * logits.abs().max()
        else:
            assert torch.equal(expected, text)


def test_more_token_ids_by_padding_do_not_matter():
    model = MoEForCausalLM(tiny_config()).eval()
    expected = plain(model, greedy(16))
    for rows in (96, 120):
        draft = dense(vocab_size=rows)
        assert torch.equal(drafted(model, draft, greedy(16)), expected)
        assert draft.get_output_embeddings().weight.shape[0] == 99


@pytest.mark.slow
def test_samples_have_the_models_own_distribution():
    """The second drawn token of 1200 texts has the distribution that the model gives, at the temperature that was asked for."""
    fields = {"vocab_size": 12, "bos_token_id": 1, "eos_token_id": None}
    model, draft = MoEForCausalLM(tiny_config(**fields)).eval(), dense(**fields)
    draft.generation_config.update(temperature=0.1, top_k=2)  # which must not reach the draft's or the model's choice
    ids = torch.tensor([[3, 7, 5]])
    temperature = 1.7

    def distribution(tokens):
        return (model(tokens).logits[:, -1].double() / temperature).softmax(-1)

    first = distribution(ids)[0]
    continued = torch.cat([ids.expand(12, -1), torch.arange(12)[:, None]], dim=1)
    expected = first @ distribution(continued)
    config = GenerationConfig(
        max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0, pad_token_id=0, eos_token_id=None
    )
    torch.manual_seed(0)
    counts = torch.zeros(12, dtype=torch.float64)
    for _ in range(1200):
        counts[drafted(model, draft, config, ids)[0, 4]] += 1
    chi2 = ((counts - 1200 * expected) ** 2 / (1200 * expected)).sum()
    assert chi2 < 31.3  # 0.1 % of samples from the distribution itself exceed this with 11 degrees of freedom


@pytest.mark.parametrize(
    ("rope", "prompt", "new", "refused"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
            6,
            8,
            False,
        ),
        (
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
            6,
            20,
            True,
        ),
        ("longrope", 6, 8, False),
        ("longrope", 6, 20, True),
        ("longrope", 18, 20, False),
    ],
)
def test_positions_that_follow_the_longest_text_of_a_call(rope, prompt, new, refused):
    if rope == "longrope":
        factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16} | factors
    model = MoEForCausalLM(tiny_config(rope_parameters=rope)).eval()
    reason = reason_not_exact(model, greedy(new), prompt)
    assert (reason is not None) == refused
    if not refused:
        ids = torch.randint(3, 99, (1, prompt), generator=torch.Generator().manual_seed(0))
        assert torch.equal(drafted(model, dense(), greedy(new), ids), plain(model, greedy(new), ids))


def test_stop_strings_are_refused():
    model = MoEForCausalLM(tiny_config()).eval()
    assert "stop_strings" in (reason_not_exact(model, greedy(4, stop_strings=["x"]), 6) or "")


def test_a_model_that_cannot_forget_is_refused_in_one_line(capsys):
    fields = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
    fields |= {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**(SIZE | {"vocab_size": 300} | fields), head_dim=8)).eval()
    writer = Writer(model, train_tokenizer(), Draft("small", dense(vocab_size=300)))
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    with pytest.raises(UserError, match="draft small cannot be used with Qwen3NextForCausalLM: "):
        write(writer, inputs, greedy(8))


def test_another_tokenizer_is_refused():
    tokenizer, other = train_tokenizer(), train_tokenizer()
    other.add_tokens(["<new>"])
    refuse_other_tokens(tokenizer, other, "small")
    refuse_other_tokens(other, tokenizer, "small")
    tokenizer.add_tokens(["<mine>"])
    with pytest.raises(UserError, match="token 300 is '<new>' there and '<mine>' in the model"):
        refuse_other_tokens(tokenizer, other, "small")


def test_speed_counts_the_accepted_tokens():
    """A model that drafts for itself has every proposal accepted."""
    model = MoEForCausalLM(tiny_config(vocab_size=300)).eval()
    draft = MoEForCausalLM(model.config).eval()
    draft.load_state_dict(model.state_dict())
    fit_draft(draft, model, 3)
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    config = greedy(12, eos_token_id=None)
    alone = write(Writer(model, train_tokenizer()), inputs, config)
    written = write(Writer(model, train_tokenizer(), Draft("itself", draft)), inputs, config)
    assert written.text == alone.text
    speed = written.speed
    assert (speed.new_tokens, speed.steps, speed.drafted, speed.accepted, speed.first_tokens) == (12, 3, 9, 9, 4)
    assert "draft: 3.00 tokens accepted per step of 3.00 drafted, 3 steps" in str(speed)
    assert (alone.speed.new_tokens, alone.speed.steps, alone.speed.accepted) == (12, 12, None)
    assert "draft" not in str(alone.speed)


def record(folder, **recipe) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "conversion.json").write_text(json.dumps({"recipe": recipe}))


def test_the_dense_source_is_found_by_the_record(tmp_path, monkeypatch):
    moe, source = tmp_path / "moe", tmp_path / "dense"
    sources = [{"name": "dense", "files": {"model.safetensors": "0"}}]
    record(moe, method="upcycle", sources=sources)
    with pytest.raises(UserError, match="names the dense source 'dense', which is not here"):
        dense_source(str(moe))
    source.mkdir()
    (source / "model.safetensors").write_text("")
    assert dense_source(str(moe)) == str(source)
    monkeypatch.chdir(tmp_path)
    assert dense_source("moe") == "dense"

    record(moe, method="upcycle", sources=[{"name": "package_with_gguf", "files": {"q4.gguf": "0"}}])
    package = tmp_path / "site" / "package_with_gguf"
    package.mkdir(parents=True)
    for name in ("__init__.py", "q4.gguf"):
        (package / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert dense_source(str(moe)) == str(package / "q4.gguf")

    record(moe, method="upcycle", sources=[{"name": "../dense", "files": {"model.safetensors": "0"}}])
    with pytest.raises(UserError, match="which is not here"):
        dense_source(str(moe))

    record(moe, method="upcycle", sources=[{"name": "0af3", "files": {"x": "0"}}], lineage={"base_model": "you/dense"})
    assert dense_source(str(moe)) == "you/dense"


def test_no_dense_source_is_one_clear_line(tmp_path):
    moe = tmp_path / "moe"
    record(moe, method="convert", source={"name": "mixtral"})
    with pytest.raises(UserError, match="tells of no upcycling"):
        dense_source(str(moe))
    (moe / "conversion.json").unlink()
    with pytest.raises(
        UserError, match=r"has no conversion\.json, which names the dense source: give a model as draft"
    ):
        dense_source(str(moe))
