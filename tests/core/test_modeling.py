"""These tests check the decoder: attention back ends, masks, caches, packing, compilation and recorded outputs."""

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from modeling_moe import (
    MoEForCausalLM,
    MoEForQuestionAnswering,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEModel,
)
from tests.builders import tiny_config


VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 4},
    "mixed windows": {
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "everything": {
        "qk_norm": "head",
        "attention_bias": True,
        "num_shared_experts": 1,
        "shared_expert_gate": True,
        "scoring_func": "sigmoid",
        "router_selection_bias": True,
        "tie_word_embeddings": True,
    },
}


def model_of(variant="plain", cls=MoEForCausalLM, **fields):
    return cls(tiny_config(**(VARIANTS[variant] | fields))).eval()


def token_ids(rows=2, length=9):
    return torch.randint(3, 99, (rows, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_token_and_other_rows_do_not_matter(variant):
    model, ids = model_of(variant, experts_implementation="eager").double(), token_ids()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 99
    changed[1] = token_ids(1)[0]
    assert torch.equal(model(ids).logits[0, :-1], model(changed).logits[0, :-1])
    assert not torch.equal(model(ids).logits[0, -1], model(changed).logits[0, -1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_back_ends_agree(variant, attention):
    model, ids = model_of(variant), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation(attention)
    with torch.no_grad():  # flex attention has no backward on CPU
        got = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_equals_decode(variant):
    model, ids = model_of(variant), token_ids()
    whole = model(ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        steps = [
            model(ids[:, t : t + 1], past_key_values=cache, position_ids=torch.full((2, 1), t)).logits
            for t in range(ids.shape[1])
        ]
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    model, ids = model_of(), token_ids(1, 10)
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :6], model(ids[:, :6]).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 6:], model(ids[:, 6:]).logits, atol=1e-5, rtol=1e-5)


def test_logits_to_keep():
    model, ids = model_of(), token_ids()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_recorded_outputs():
    model, ids = model_of("everything"), token_ids()
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 4
    assert [a.shape for a in out.attentions] == [(2, 4, 9, 9)] * 3
    assert [r.shape for r in out.router_logits] == [(18, 5)] * 2
    assert out.expert_load.shape == (2, 5)
    assert out.expert_load.sum(-1).tolist() == [54, 54]
    assert out.aux_loss.shape == ()
    plain = model(ids)
    assert (plain.router_logits, plain.hidden_states, plain.aux_loss, plain.expert_load) == (None,) * 4


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@torch.no_grad()
def test_compiles_without_graph_breaks_into_a_static_cache(implementation):
    model = model_of("everything", experts_implementation=implementation)
    ids = token_ids(1, 1)
    cache = StaticCache(config=model.config, max_cache_len=4)
    arguments = {"past_key_values": cache, "position_ids": torch.zeros(1, 1, dtype=torch.long)}
    expected = model(ids, **arguments).logits
    cache.reset()
    torch.compiler.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, **arguments).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="its own grouped_mm fallback has no compiled backward"
)
def test_training_step_compiles_without_graph_breaks():
    model = model_of("everything").train()
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_tied_head_shares_its_weight(tmp_path):
    model = model_of(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_nan_in_embeddings_is_located():
    model, embeds = model_of(), torch.zeros(2, 4, 32)
    embeds[1, 2, 5] = float("nan")
    with pytest.raises(ValueError, match="inputs_embeds has a NaN in row 1 at position 2"):
        model(inputs_embeds=embeds)


def test_ids_and_embeddings_exclude_each_other():
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model_of()()


def test_embeddings_in_the_place_of_ids():
    model, ids = model_of(), token_ids()
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("cls", "labels"),
    [
        (MoEForSequenceClassification, {"labels": torch.tensor([0, 2])}),
        (MoEForTokenClassification, {"labels": torch.zeros(2, 9, dtype=torch.long)}),
        (
            MoEForQuestionAnswering,
            {"start_positions": torch.tensor([0, 2]), "end_positions": torch.tensor([4, 5])},
        ),
    ],
)
def test_heads_train_their_routers(cls, labels, tmp_path):
    model = model_of(cls=cls, num_labels=3, router_aux_loss_coef=1.0)
    ids = token_ids()
    grads = []
    for coefficient in (1.0, 0.0):
        model.config.router_aux_loss_coef = coefficient
        model.zero_grad()
        torch.manual_seed(0)
        model.train()(ids, **labels).loss.backward()
        grads.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    assert not torch.allclose(*grads)
    model.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(cls.from_pretrained(tmp_path)(ids)[0], model(ids)[0])


def test_head_loads_the_causal_models_decoder(tmp_path):
    causal = model_of()
    causal.save_pretrained(tmp_path)
    decoder = MoEModel.from_pretrained(tmp_path)
    ids = token_ids()
    torch.testing.assert_close(decoder(ids).last_hidden_state, causal.model(ids).last_hidden_state)
