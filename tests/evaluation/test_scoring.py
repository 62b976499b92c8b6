"""These tests compare perplexity, bits per byte and the experts' load with values computed by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GptOssConfig,
    JetMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from modeling_moe import MoEForCausalLM
from modeling_moe.commands.evaluate import print_scores
from modeling_moe.data import DataArguments, pack
from modeling_moe.evaluation import EvaluationArguments, evaluate_lm, score
from modeling_moe.evaluation.hf_metrics import RouterBalance
from modeling_moe.monitoring import active_share
from modeling_moe.training.trainer import FinetuneTrainer
from modeling_moe.utils.errors import UserError
from tests.builders import sample_text, tiny_config, tiny_model, train_tokenizer
from tests.data.test_documents import MARKED, PLAIN, joined, write_chats
from tests.ranks import run_ranks


@pytest.fixture
def blocks(tokenizer) -> Dataset:
    """Returns blocks of 13 tokens, and a shorter last block."""
    packed = pack(Dataset.from_dict({"text": [sample_text(12)]}), tokenizer, max_length=13, for_scoring=True)
    assert 1 < len(packed[-1]["input_ids"]) < 13
    return packed


@torch.no_grad()
def test_score_is_the_hand_computation(blocks):
    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")  # the other back ends have no float64
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


TINY = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
}
FOREIGN = {
    "mixtral": lambda: MixtralConfig(**TINY, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**TINY, num_experts=4),
    "olmoe": lambda: OlmoeConfig(**TINY, num_experts=4),
    "gpt_oss": lambda: GptOssConfig(**TINY, num_local_experts=4),
    "deepseek_v3": lambda: DeepseekV3Config(
        **TINY | LATENT | {"num_key_value_heads": 2},
        num_local_experts=4,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FOREIGN)
def test_the_load_of_transformers_own_experts_was_missing(family, blocks):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FOREIGN[family]()).eval()
    result = score(model, blocks.select(range(3)), batch_size=2)
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda module, args, name=name: seen.setdefault(name, []).append(args[1])
                )
            )
    for row in blocks.select(range(3)):
        model(torch.tensor([row["input_ids"]]))
    layers = [torch.cat(index).flatten() for index in seen.values()]
    assert len(layers) == (1 if family == "deepseek_v3" else 2)
    load = torch.stack([(layer[:, None] == torch.arange(4)).sum(dim=0) for layer in layers]).double()
    assert load.sum() == len(layers) * 3 * 13 * 2
    expected = RouterBalance(keep_in_memory=True).compute(load=[load.tolist()])
    assert result.expert_share == pytest.approx(expected["expert_share"])
    assert result.max_vio == pytest.approx(expected["max_violation"])
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_mixtrals_load_is_the_largest_of_its_router_logits(blocks):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FOREIGN["mixtral"]()).eval()
    logits = model(torch.tensor(blocks[:2]["input_ids"]), output_router_logits=True).router_logits
    load = [torch.bincount(layer.topk(2).indices.flatten(), minlength=4).tolist() for layer in logits]
    expected = RouterBalance(keep_in_memory=True).compute(load=[load])
    assert score(model, blocks.select([0, 1])).expert_share == pytest.approx(expected["expert_share"])


def test_experts_that_cannot_be_watched_are_named(tokenizer, text_file, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_moe.evaluation.scoring.logger.warning", said.append)
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 1}
    AutoModelForCausalLM.from_config(JetMoeConfig(**TINY | fields)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = evaluate_lm(
        EvaluationArguments(str(tmp_path), max_tokens=64), DataArguments(data=[f"a={text_file}"], max_length=32)
    )
    assert scores["a"].max_vio is scores["a"].expert_load is None
    assert math.isfinite(scores["a"].loss)
    (warning,) = said
    assert "JetMoeForCausalLM" in warning
    assert "does not follow transformers' experts interface" in warning


@torch.no_grad()
def test_layers_with_different_numbers_of_experts_had_no_load(blocks):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FOREIGN["mixtral"]()).eval()
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(MixtralConfig(**TINY, num_local_experts=7))
    model.init_weights()
    result = score(model, blocks)
    assert [len(layer) for layer in result.expert_load] == [4, 7]
    tokens = sum(len(row["input_ids"]) for row in blocks)
    assert [sum(layer) for layer in result.expert_load] == [2 * tokens] * 2
    vio = [max(layer) / (2 * tokens / len(layer)) - 1 for layer in result.expert_load]
    assert result.max_vio == pytest.approx(sum(vio) / 2)
    assert result.expert_share is None
    print_scores({"a": result}, "model")


def test_no_number_was_cut_off_in_80_columns(blocks, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = tiny_model()
    with torch.no_grad():
        result = score(model, blocks.select(range(3)))
    result = replace(result, expert_share=[0.125] * 8, token_entropy=1.62, marginal_entropy=1.94, max_vio=1.612)
    print_scores(
        {"wiki": replace(result, loss=6.4064, perplexity=605.694, bits_per_byte=8.5703, tokens=11042)}, "model"
    )
    printed = capsys.readouterr().out
    for text in ("11,042", "605.694", "8.5703", "1.612", "1.62, 1.94", "router entropy", "12.5 12.5"):
        assert text in printed
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed


@torch.no_grad()
def test_entropies_and_drops_are_means_over_layers(blocks):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FOREIGN["mixtral"]()).eval()
    rows = blocks.select(range(3))
    logits = model(torch.tensor(rows["input_ids"]), output_router_logits=True).router_logits
    probs = [layer.softmax(dim=-1) for layer in logits]
    token = [torch.special.entr(layer).sum(dim=-1).mean().item() for layer in probs]
    marginal = [torch.special.entr(layer.mean(dim=0)).sum().item() for layer in probs]
    result = score(model, rows)
    assert result.token_entropy == pytest.approx(sum(token) / 2, rel=1e-5)
    assert result.marginal_entropy == pytest.approx(sum(marginal) / 2, rel=1e-5)
    assert (result.dropped_share, result.mean_experts) == (0.0, 2.0)
    dropping = score(tiny_model(eval_capacity_factor=0.5), rows)
    assert 0.1 < dropping.dropped_share < 0.9
    assert sum(dropping.expert_load[0]) == 3 * 39


@pytest.mark.parametrize("fields", [{"eval_capacity_factor": 0.5}, {"expert_capacity": 2}])
def test_a_capacity_made_the_score_depend_on_the_batch_size(fields, blocks):
    model = tiny_model(**fields)
    one, all_at_once = score(model, blocks, batch_size=1), score(model, blocks, batch_size=100)
    assert one.loss == pytest.approx(all_at_once.loss, rel=1e-6)
    assert one.expert_share == all_at_once.expert_share
    assert one.loss != pytest.approx(score(tiny_model(), blocks).loss, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_a_file_of_chats_was_refused(template, tmp_path):
    tokenizer, model = train_tokenizer(), tiny_model()
    tokenizer.chat_template = template
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chats = write_chats(tmp_path / "chats.jsonl", count=4)
    args = EvaluationArguments(str(tmp_path / "model"), batch_size=3)
    scores = {
        only: evaluate_lm(args, DataArguments(data=[f"a={chats}"], max_length=16, assistant_only=only))["a"]
        for only in (True, False)
    }
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    tokenizer.chat_template = MARKED
    encoded = [tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True) for row in rows]
    ids, said = (joined(row[name] for row in encoded) for name in ("input_ids", "assistant_masks"))
    for only, result in scores.items():
        nats, tokens, size = 0.0, 0, 0
        for start in range(0, len(ids), 16):
            block = ids[start : start + 16]
            log_probs = model.eval()(torch.tensor([block])).logits[0].log_softmax(dim=-1)
            for i in range(1, len(block)):
                if said[start + i] or not only:
                    nats -= log_probs[i - 1, block[i]].item()
                    tokens += 1
                    size += len(tokenizer.decode([block[i]], skip_special_tokens=True).encode())
        assert result.tokens == tokens
        assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
        if only:
            assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-5)
    assert scores[True].tokens < scores[False].tokens


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": [{"role": "user", "content": "der Weg"}]}], "nothing that the assistant says"),
        ([{"text": "x"}], "fewer than the 2 tokens"),
        ([{"prompt": "der Weg", "completion": ""}], "holds no text"),
    ],
)
def test_nothing_to_score_was_not_a_number(rows, message, tmp_path):
    tokenizer = train_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = PLAIN, None
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match=message):
        evaluate_lm(EvaluationArguments(str(tmp_path / "model")), DataArguments(data=[f"a={tmp_path / 'a.jsonl'}"]))


def test_a_tokenizer_larger_than_the_model_was_an_index_error(text_file, tokenizer, tmp_path):
    model = tiny_model()
    model.resize_token_embeddings(290)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="the tokenizer has 300 tokens and the model 290"):
        evaluate_lm(EvaluationArguments(str(tmp_path / "model")), DataArguments(data=[f"a={text_file}"]))


def rank_main(rank: int, blocks: Dataset, folder: str) -> None:
    PartialState(cpu=True, backend="gloo")
    # an odd number of batches, then a single batch, so that one process has none
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
            assert two.expert_load == one.expert_load
            assert two.token_entropy == pytest.approx(one.token_entropy, rel=1e-9)
            assert two.dropped_share == one.dropped_share


def test_total_flos_counted_every_expert_of_a_token():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, **sizes)
    with torch.device("meta"):
        sparse = MixtralForCausalLM(config)
        dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    experts, total = 2 * 8 * 3 * 32 * 16, sparse.num_parameters(exclude_embeddings=True)
    assert active_share(sparse) == pytest.approx((total - experts * 6 / 8) / total)
    assert active_share(dense) == 1.0
    trainer = FinetuneTrainer.__new__(FinetuneTrainer)
    trainer.model = sparse
    flos = trainer.floating_point_ops({"input_ids": torch.zeros(1, 10)})
    assert flos == round(6 * 10 * (total - experts * 6 / 8))
    # ERNIE's configuration has another name for the number of experts per token
    named = Ernie4_5_MoeConfig(vocab_size=64, num_key_value_heads=2, moe_num_experts=8, moe_k=2, **sizes)
    with torch.device("meta"):
        ernie = Ernie4_5_MoeForCausalLM(named)
    routed = sum(parameter.numel() for name, parameter in ernie.named_parameters() if ".experts." in name)
    assert routed > 0
    assert active_share(ernie) == pytest.approx(1 - routed * 6 / 8 / ernie.num_parameters(exclude_embeddings=True))
    ours = MoEForCausalLM(tiny_config(num_experts=4, num_experts_per_tok=1))
    embeddings = ours.model.embed_tokens.weight.numel()
    active = ours.config.num_active_params() - embeddings
    assert active_share(ours) == pytest.approx(active / ours.num_parameters(exclude_embeddings=True))
