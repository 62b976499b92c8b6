"""Perplexity and bits per byte by hand, and the experts' load."""

import math

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moe.cli import UserError
from modeling_moe.training import DataArguments, EvaluationArguments, evaluate_lm, pack, score
from modeling_moe.training.measures import RouterBalance
from tests.ranks import run_ranks
from tests.training.conftest import sample_text, tiny_model


@pytest.fixture
def blocks(tokenizer) -> Dataset:
    """Blocks of 13 tokens and a shorter last one."""
    packed = pack(Dataset.from_dict({"text": [sample_text(12)]}), tokenizer, max_length=13, for_scoring=True)
    assert 1 < len(packed[-1]["input_ids"]) < 13
    return packed


@torch.no_grad()
def test_score_is_the_hand_computation(blocks):
    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")  # the others have no float64
    nats, tokens, size = 0.0, 0, 0
    for row in blocks:
        log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(dim=-1)
        for position, token in enumerate(row["input_ids"][1:]):
            nats -= log_probs[position, token].item()
            tokens += 1
        size += sum(row["num_bytes"][1:])
    for batch_size in (1, 3, 100):
        result = score(model, blocks, batch_size)
        assert (result.tokens, result.bytes) == (tokens, size)
        assert result.loss == pytest.approx(nats / tokens, rel=1e-12)
        assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-12)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_uniform_model_costs_the_logarithm_of_the_vocabulary(blocks):
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = score(model, blocks)
    assert result.loss == pytest.approx(math.log(300))
    assert result.bits_per_byte == pytest.approx(math.log2(300) * result.tokens / result.bytes)


@torch.no_grad()
def test_expert_load_is_the_models(blocks):
    model = tiny_model().eval()
    load = sum(
        model(torch.tensor([row["input_ids"]]), output_router_logits=True).expert_load.double() for row in blocks
    )
    result = score(model, blocks, batch_size=4)
    assert (load.sum(dim=-1) == 3 * sum(len(row["input_ids"]) for row in blocks)).all()
    expected = RouterBalance(keep_in_memory=True).compute(load=[load.tolist()])
    assert result.expert_share == pytest.approx(expected["expert_share"])
    assert result.max_vio == pytest.approx(expected["max_violation"])
    assert result.load_entropy == pytest.approx(expected["load_entropy"])
    assert result.dead_experts == expected["dead_experts"]
    assert sum(result.expert_share) == pytest.approx(1)


def test_dense_models_have_no_load(blocks):
    ours = tiny_model(mlp_layer_types=["dense"] * 3)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    for model in (ours, llama):
        result = score(model, blocks)
        assert result.expert_share is None
        assert result.max_vio is result.load_entropy is result.dead_experts is None
        assert math.isfinite(result.loss)


def test_max_tokens_takes_whole_blocks(checkpoint, text_file):
    args = EvaluationArguments(str(checkpoint), max_tokens=70)
    result = evaluate_lm(args, DataArguments(data=[f"a={text_file}"], max_length=32))["a"]
    assert result.tokens == 2 * 31
    with pytest.raises(UserError, match="max_tokens 70 is less than a block"):
        evaluate_lm(args, DataArguments(data=[f"a={text_file}"], max_length=71))


def rank_main(rank: int, blocks: Dataset, folder: str) -> None:
    PartialState(cpu=True, backend="gloo")
    # an odd number of batches, then a single one, of which a rank has none
    scores = [score(tiny_model(), blocks, 4), score(tiny_model(), blocks.select([0]), 4)]
    torch.save(scores, f"{folder}/{rank}.pt")


def test_two_processes_are_one(blocks, tmp_path):
    expected = [score(tiny_model(), blocks, 4), score(tiny_model(), blocks.select([0]), 4)]
    run_ranks(rank_main, 2, blocks, str(tmp_path))
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for one, two in zip(expected, result, strict=True):
            assert (two.tokens, two.bytes, two.expert_share) == (one.tokens, one.bytes, one.expert_share)
            assert two.loss == pytest.approx(one.loss, rel=1e-6)
            assert two.max_vio == one.max_vio
