"""These tests compare cached text with uncached text for each router, cache and generation mode, also by a checkpoint's code."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config
from tests.core.test_catalogue import ALL, CAUSAL, NONCAUSAL, TASKS, model_of
from tests.processes import run_without_package
from tests.selection import by_default


NEW = {"max_new_tokens": 6, "min_new_tokens": 6}
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "contrast": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}
# a plain capacity factor depends on the length of the sequence
CACHED = [name for name in CAUSAL if name != "token_capacity"]
# routers that need task_ids
BY_TASK = ("task", "mmoe")
# routers by tokens, by their ids, with empty assignments, with several numbers of experts, and mixing in training alone
BATCHED = ("softmax", "dag", "zaya", "hash", "deepseek_v4", "null_and_copy", "top_p", "sinkhorn")
REMEMBERING = ("lory", "absolute_capacity", "running_capacity")
# name -> router_type or field that the refusal of continuous batching names
MIXING = {
    "lory": "router_type='lory'",
    "absolute_capacity": "expert_capacity",
    "running_capacity": "eval_capacity_factor",
    "token_capacity": "eval_capacity_factor",
    "expert_choice": "router_type='expert_choice'",
    "soft_moe": "router_type='soft_moe'",
    "k_major": "eval_capacity_factor",
    "probability": "eval_capacity_factor",
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
ATTENTION = {
    "sliding": {"sliding_window": 4},
    "mixed": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "sinks": {"attention_sinks": True},
    "softcap": {"attn_logit_softcapping": 5.0},
    "learned": {"position_embedding_type": "learned"},
    "latent": {**LATENT, "num_key_value_heads": 4},
    "gated": {"attn_output_gate": True, "qk_norm": "head", "qk_norm_after_rope": True},
    "moa": {"routed_attention": "moa", "attention_experts": 5, "num_attention_heads": 8},
    "scaled": {
        "llama_4_scaling_beta": 0.5,
        "rope_parameters": {"rope_theta": 100.0, "original_max_position_embeddings": 3},
    },
}


def batch() -> dict[str, torch.Tensor]:
    """Returns three prompts, two of them padded on the left."""
    ids = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, padding in ((0, 3), (2, 1)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def text(model, inputs, **arguments) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(**inputs, **NEW, **arguments)


@pytest.mark.parametrize("name", CACHED)
def test_each_mode_and_cache_gives_the_uncached_text(name):
    # in float64, where the order of a sum does not decide between two logits
    model = model_of(name).double().eval()
    inputs = batch() | ({"task_ids": TASKS} if name in BY_TASK else {})
    modes = {"greedy": MODES["greedy"]} if name in BY_TASK else MODES
    for mode, arguments in modes.items():
        expected = text(model, inputs, use_cache=False, **arguments)
        assert torch.equal(text(model, inputs, **arguments), expected), mode
        if name not in REMEMBERING:
            static = {"cache_implementation": "static", "disable_compile": True}
            assert torch.equal(text(model, inputs, **static, **arguments), expected), mode
    alone = {key: value[2:, 1:] if value.dim() == 2 else value[2:] for key, value in inputs.items()}
    greedy = text(model, alone, **MODES["greedy"])
    assert torch.equal(greedy[:, 6:], text(model, inputs, **MODES["greedy"])[2:, 7:])
    if name not in BY_TASK:
        assert torch.equal(text(model, alone, do_sample=False, prompt_lookup_num_tokens=2), greedy)


@pytest.mark.parametrize("name", ATTENTION)
def test_each_attention_gives_the_uncached_text(name):
    model = MoEForCausalLM(tiny_config(**ATTENTION[name])).double().eval()
    expected = text(model, batch(), do_sample=False, use_cache=False)
    assert torch.equal(text(model, batch(), do_sample=False), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(text(model, batch(), do_sample=False, **static), expected)


def continuously(model, prompts: list[list[int]]) -> list[list[int]]:
    """Generates six tokens for each prompt by transformers' continuous batching, greedily."""
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # by default the cache takes nine tenths of the machine's memory
    small = ContinuousBatchingConfig(max_memory_percent=0.001, max_batch_tokens=64)
    results = model.generate_batch(prompts, options, continuous_batching_config=small, warmup=False)
    ordered = [results[key] for key in sorted(results, key=lambda key: int(key.rsplit("_", 1)[1]))]
    assert all(result.error is None for result in ordered), ordered[0].error
    return [list(result.generated_tokens) for result in ordered]


def alone(model, prompt: list[int]) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=False)
    return ids[0, len(prompt) :].tolist()


PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27]]


@pytest.mark.parametrize("name", by_default(BATCHED, [name for name in ALL if name not in (*MIXING, *BY_TASK)]))
def test_continuous_batching_gives_the_same_text(name):
    model = model_of(name, eos_token_id=None).eval()
    assert continuously(model, PROMPTS) == [alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in ("softcap", "latent")])
def test_continuous_batching_with_each_attention(name):
    model = MoEForCausalLM(tiny_config(**ATTENTION[name], eos_token_id=None)).eval()
    assert continuously(model, PROMPTS) == [alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", MIXING)
def test_continuous_batching_is_refused_where_tokens_of_a_row_mix(name):
    with pytest.raises(ValueError, match=f"continuous batching would change the text, because {MIXING[name]}"):
        continuously(model_of(name, eos_token_id=None).eval(), PROMPTS)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("softmax", {"capacity_factor": 0.5}, "capacity_factor counts"),
        ("sinkhorn", {}, "router_type='sinkhorn' mixes"),
        ("base_layer", {}, "router_type='base_layer' mixes"),
    ],
)
def test_continuous_batching_in_training_mode_is_refused_by_what_counts_there(name, fields, reason):
    model = model_of(name, eos_token_id=None, **fields).train()
    with pytest.raises(ValueError, match=reason):
        continuously(model, PROMPTS)
    model.config.refuse_continuous_batching(training=False)


@pytest.mark.parametrize("name", BY_TASK)
def test_continuous_batching_without_a_task_is_refused_before_it_starts(name):
    with pytest.raises(ValueError, match=f"router_type='{name}' asks for task_ids, which a request cannot give"):
        continuously(model_of(name, eos_token_id=None).eval(), PROMPTS)


@pytest.mark.parametrize(("name", "field"), [("softcap", "attn_logit_softcapping"), ("latent", "kv_lora_rank")])
def test_continuous_batching_is_refused_where_it_has_no_such_attention(name, field):
    with pytest.raises(ValueError, match=f"because {field} is set"):
        continuously(MoEForCausalLM(tiny_config(**ATTENTION[name])).eval(), PROMPTS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
        {
            "rope_type": "longrope", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 6, "long_factor": [9.0] * 6,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_continuous_batching_is_refused_where_positions_follow_the_longest_sequence(rope):
    by_kind = {"full_attention": {"rope_type": "default", "rope_theta": 100.0}, "sliding_attention": rope}
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
    for fields in ({"rope_parameters": rope}, {"rope_parameters": by_kind, **kinds}):
        with pytest.raises(ValueError, match=f"rope_type='{rope['rope_type']}', which follows the longest sequence"):
            continuously(MoEForCausalLM(tiny_config(**fields)).eval(), PROMPTS)


def test_every_router_is_batched_continuously_or_refused():
    assert set(MIXING) <= set(ALL)
    assert set(NONCAUSAL) - set(MIXING) == {"sinkhorn", "base_layer"}  # per token in evaluation


OWN_CODE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
prompts = [[5, 6, 7, 8, 9], [11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27]]
ids = torch.zeros(3, 8, dtype=torch.long)
for row, prompt in enumerate(prompts):
    ids[row, 8 - len(prompt):] = torch.tensor(prompt)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    arguments = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **arguments, use_cache=False)
    assert torch.equal(model.generate(ids, **arguments), expected), folder.name
    if folder.name not in ("lory", "absolute_capacity", "running_capacity"):
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(ids, **arguments, **static), expected), folder.name
        options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
        small = ContinuousBatchingConfig(max_memory_percent=0.001, max_batch_tokens=64)
        results = model.generate_batch(prompts, options, continuous_batching_config=small, warmup=False)
        results = [results[key].generated_tokens for key in sorted(results, key=lambda key: int(key.rsplit("_", 1)[1]))]
        assert results == expected[:, 8:].tolist(), folder.name
    torch.save(expected, folder / "text.pt")
"""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["deepseek_v3"], id="one router"),
        pytest.param([name for name in CACHED if name not in BY_TASK], id="all routers", marks=pytest.mark.slow),
    ],
)
def test_the_code_of_a_checkpoint_gives_the_same_text(names, tmp_path):
    models = {name: model_of(name, eos_token_id=None).eval() for name in names}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "models" / name)
    run_without_package(OWN_CODE, tmp_path, tmp_path / "models")
    for name, model in models.items():
        written = torch.load(tmp_path / "models" / name / "text.pt")
        for row, prompt in zip(written, PROMPTS, strict=True):
            assert row[8:].tolist() == alone(model, prompt), name
