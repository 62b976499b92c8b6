"""These tests check the texts, the weights and the measurements of the small models that read bytes."""

import math

import numpy as np
import pytest
import torch
from experiments.byte_models import (
    ByteModelArguments,
    Corpus,
    batches,
    build,
    curve,
    held_out_scores,
    model_config,
    starved_share,
)


MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("fields", [{"router_type": "noisy_topk"}, {"num_null_experts": 2}, {"num_shared_experts": 1}])
def test_models_share_all_weights_but_the_routers(fields):
    models = [build(model_config(MODEL | f, ""), model_config(MODEL, ""), seed=3) for f in ({}, fields)]
    plain, other = (dict(model.named_parameters()) for model in models)
    shared = [name for name in plain if ".gate." not in name]
    assert len(shared) > 10
    for name in shared:
        assert torch.equal(plain[name], other[name]), name
    if fields.get("router_type") == "noisy_topk":
        assert not any(value.any() for name, value in other.items() if ".gate." in name)


def test_batches_are_sequences_of_the_text_whose_task_is_the_domain():
    domains = {"low": np.arange(100, dtype=np.uint8), "high": np.arange(100, 240, dtype=np.uint8)}
    args = ByteModelArguments(batch_size=3, length=8)
    drawn = list(batches(domains, args, 40, seed=0))
    ids, tasks = torch.cat([batch["input_ids"] for batch in drawn]), torch.cat([batch["task_ids"] for batch in drawn])
    assert tasks.tolist() == [0, 1] * 60
    assert torch.equal(ids, ids[:, :1] + torch.arange(8))
    assert torch.equal(ids >= 100, (tasks == 1)[:, None].expand_as(ids))
    assert len(set(ids[:, 0].tolist())) > 60


@pytest.mark.parametrize(("size", "entropy"), [(0.0, math.log(4)), (100.0, 0.0)])
def test_held_out_scores_of_a_router_whose_logits_are_known(size, entropy):
    model = build(model_config(MODEL, ""), model_config(MODEL, ""), seed=0)
    logits = torch.tensor([size, 0.0, -size, -size])
    for block in model.model.sparse_blocks():
        block.gate.logits = lambda states, context: logits.expand(len(states), 4)
    text = np.arange(200, dtype=np.uint8)
    args = ByteModelArguments(batch_size=2, length=16, eval_batches=2)
    scores = held_out_scores(model, Corpus({}, {"a": text}), args, 0)
    assert scores["mean_experts"] == 2
    assert scores["max_vio"] == pytest.approx(1.0)
    assert scores["token_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert scores["marginal_entropy"] == pytest.approx(entropy, abs=1e-6)


def test_starved_experts_have_less_than_a_tenth_of_the_mean_load():
    load = torch.tensor([[100, 100, 100, 100], [289, 100, 10, 1], [400, 0, 0, 0]])
    assert starved_share(load).tolist() == [0.0, 0.25, 0.75]
    # a load of exactly a tenth is not starved
    assert starved_share(torch.tensor([[290, 100, 10, 0]])).tolist() == [0.25]


def test_a_curve_is_the_means_of_ten_values():
    assert curve([float(value) for value in range(23)]) == [4.5, 14.5, 21.0]
    assert curve([]) == []


def test_a_fingerprint_knows_text_names_and_parts():
    one, other = np.arange(9, dtype=np.uint8), np.arange(1, 10, dtype=np.uint8)
    corpora = [
        Corpus({"a": one}, {"a": other}),
        Corpus({"a": other}, {"a": one}),
        Corpus({"a": one}, {"b": other}),
        Corpus({"a": one}, {"a": other[:-1]}),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 4
    assert corpora[0].fingerprint == Corpus({"a": one.copy()}, {"a": other.copy()}).fingerprint
