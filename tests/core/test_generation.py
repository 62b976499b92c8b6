"""These tests compare the modes of `generate` with plain greedy search, or with a second run."""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config


LENGTH = {"min_new_tokens": 8, "max_new_tokens": 8}


@pytest.fixture
def model():
    return MoEForCausalLM(tiny_config(num_shared_experts=1, qk_norm="head")).eval()


@pytest.fixture
def batch():
    ids = torch.randint(3, 99, (2, 6))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def greedy(model, batch):
    return model.generate(**batch, **LENGTH, do_sample=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_equals_greedy(model, batch, greedy, arguments):
    torch.compiler.reset()
    assert torch.equal(model.generate(**batch, **LENGTH, do_sample=False, disable_compile=True, **arguments), greedy)


@pytest.mark.parametrize("arguments", [{"assistant": True}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_speculation_equals_greedy(model, batch, arguments):
    ids = batch["input_ids"][1:]
    if arguments.pop("assistant", False):
        arguments["assistant_model"] = MoEForCausalLM(
            tiny_config(num_hidden_layers=1, mlp_layer_types=["sparse"])
        ).eval()
    expected = model.generate(ids, **LENGTH, do_sample=False)
    assert torch.equal(model.generate(ids, **LENGTH, do_sample=False, **arguments), expected)


def test_padding_on_the_left_changes_no_text(model, batch, greedy):
    alone = model.generate(batch["input_ids"][:1, 2:], **LENGTH, do_sample=False)
    assert torch.equal(alone, greedy[:1, 2:])


def test_embeddings_as_the_prompt(model, batch, greedy):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    text = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **LENGTH, do_sample=False)
    assert torch.equal(text, greedy[:, 6:])


@pytest.mark.parametrize(
    "arguments", [{"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}], ids=str
)
def test_beams_and_sampling(model, batch, arguments):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(model.generate(**batch, **LENGTH, num_return_sequences=2, **arguments))
    assert texts[0].shape == (4, 14)
    assert torch.equal(*texts)


def test_continues_from_a_cache(model, batch):
    ids = batch["input_ids"][1:]
    first = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert torch.equal(rest, model.generate(ids, **LENGTH, do_sample=False))


def test_returns_what_it_is_asked_for(model, batch):
    model.set_attn_implementation("eager")
    out = model.generate(
        **batch,
        **LENGTH,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == 8


@pytest.mark.slow
def test_compiled_static_cache(model, batch, greedy):
    """`generate` with a static cache and the real compiler, as on an accelerator, gives the same text."""
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(**batch, **LENGTH, do_sample=False, cache_implementation="static"), greedy)
