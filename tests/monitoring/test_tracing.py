"""These tests recount a trace token by token from what the routers returned, and look at the texts of tokens."""

import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_moe.data import pack
from modeling_moe.monitoring import UnreachableRouting, sparse_layers, watch
from modeling_moe.monitoring.report import TraceOptions, compare_traces, trace_routing
from modeling_moe.monitoring.report.comparing import load_shift
from modeling_moe.monitoring.report.page.words import worst_layer
from modeling_moe.monitoring.report.specialisation import significant_cells
from modeling_moe.monitoring.report.text_places import Texts
from modeling_moe.monitoring.report.token_texts import token_label, token_texts
from modeling_moe.monitoring.report.top_tokens import MIN_OCCURRENCES, lower_bound
from modeling_moe.monitoring.report.trace_sums import margins
from tests.builders import SIZE, sample_text, tiny_model, train_tokenizer
from tests.monitoring.moe_families import experts_families, sharpen, tiny_family


LENGTH = 48


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def domains(tokenizer):
    """Two domains: ten full blocks of one text and a shorter last one, and another text with fewer."""
    lines = sample_text().splitlines(keepends=True)
    texts = {"a": "".join(lines[:12]), "b": "".join(sorted(lines[12:24]))}
    rows = {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in texts.items()}
    return {name: pack(row, tokenizer, LENGTH, for_scoring=True) for name, row in rows.items()}


def mixtral(**fields):
    torch.manual_seed(0)
    shape = {"num_local_experts": 5, "num_experts_per_tok": 2, "vocab_size": 300, "pad_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**(SIZE | shape | fields)))


def deepseek():
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    mla = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    more = {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4, "num_hidden_layers": 3}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(SIZE | shape | mla | more)))


MODELS = {
    "topk": lambda: tiny_model(num_experts_per_tok=2),
    "capacity": lambda: tiny_model(eval_capacity_factor=0.7, capacity_factor=0.7),
    "null experts": lambda: tiny_model(num_null_experts=3, num_experts_per_tok=3),
    "copy experts": lambda: tiny_model(num_copy_experts=2, num_experts_per_tok=3),
    "variable K": lambda: tiny_model(router_type="top_p", num_experts_per_tok=3),
    "sigmoid": lambda: tiny_model(scoring_func="sigmoid", router_selection_bias=True),
    "hash": lambda: tiny_model(router_type="hash", num_experts_per_tok=1),
    "mixtral": mixtral,
    "deepseek_v3": deepseek,
}


class Token(NamedTuple):
    """What one layer does with one token: ids of chosen and of reached experts, by falling weight; all probabilities."""

    position: int
    chosen: list[int]
    outputs: int
    reached: list[int]
    probs: list[float]


def foreign_probs(gate, hidden, name):
    """Returns the probabilities of transformers' own router, from its weight, in float64."""
    logits = hidden.double().reshape(-1, hidden.shape[-1]) @ gate.weight.double().T
    scores = logits.softmax(-1) if name == "mixtral" else logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


def record(model, name, ids):
    """Runs one block, and returns for each sparse layer a list of its tokens."""
    calls, gates = [], []
    modules = dict(model.named_modules())
    blocks = [path.removesuffix(".experts") for path in modules if path.endswith(".experts")]
    handles = []
    for block in blocks:
        experts, gate = modules[f"{block}.experts"], modules[f"{block}.gate"]
        handles.append(
            experts.register_forward_pre_hook(
                lambda m, args, kw: calls.append([*args, *kw.values()]), with_kwargs=True
            )
        )
        handles.append(gate.register_forward_hook(lambda m, args, output: gates.append((m, args[0], output))))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    for handle in handles:
        handle.remove()
    layers = []
    for (_, arrived, weight), (gate, hidden, output) in zip((call[:3] for call in calls), gates, strict=True):
        own = hasattr(output, "probs")
        probs = (output.probs if own else foreign_probs(gate, hidden, name)).double().tolist()
        index = (output.index if own else arrived).tolist()
        experts = len(probs[0]) - (model.config.num_null_experts + model.config.num_copy_experts if own else 0)
        tokens = []
        for position, row in enumerate(index):
            order = sorted(range(len(row)), key=lambda slot, at=position: -weight[at, slot].item())
            reached = [int(arrived[position, slot]) for slot in order if arrived[position, slot] < experts]
            chosen = [expert for expert in row if expert < experts]
            outputs = sum(expert < len(probs[0]) for expert in row)
            tokens.append(Token(position, chosen, outputs, reached, probs[position]))
        layers.append(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    return layers, loss


def entropy(shares):
    return -sum(share * math.log(share) for share in shares if share > 0)


def margin(token):
    ranked = sorted(token.probs, reverse=True)
    return ranked[token.outputs - 1] - ranked[token.outputs] if 0 < token.outputs < len(ranked) else 0.0


def check_summary(found, tokens, load, knows_logits):
    """Compares a summary with a recount of its tokens and with the load (E,)."""
    chosen = sum(len(token.chosen) for token in tokens)
    reached = sum(len(token.reached) for token in tokens)
    mean = np.mean([token.probs for token in tokens], axis=0)
    assert found.max_violation == pytest.approx(max(load) / np.mean(load) - 1)
    assert found.dead_experts == pytest.approx(np.mean(load == 0))
    assert found.mean_experts == pytest.approx(reached / len(tokens))
    assert found.dropped_share == pytest.approx(1 - reached / chosen)
    if not knows_logits:
        assert found.token_entropy is found.marginal_entropy is found.gate_margin is None
        return
    assert found.token_entropy == pytest.approx(np.mean([entropy(token.probs) for token in tokens]), rel=1e-5)
    assert found.marginal_entropy == pytest.approx(entropy(mean), rel=1e-5)
    assert found.gate_margin == pytest.approx(np.mean([margin(token) for token in tokens]), rel=1e-4, abs=1e-9)


def check_layer(found, edges, domains, knows_logits):
    """Compares a layer's trace with the tokens of each domain."""
    experts, tokens = found.num_experts, [token for domain in domains for token in domain]
    load, position = np.zeros((len(domains), experts)), np.zeros((len(edges) - 1, experts))
    together = np.zeros((experts, experts))
    for place, domain in enumerate(domains):
        for token in domain:
            for expert in token.reached:
                load[place, expert] += 1
                position[max(p for p, edge in enumerate(edges[:-1]) if edge <= token.position), expert] += 1
            for one in token.reached:
                together[one, token.reached] += 1
    assert found.load.tolist() == load.tolist()
    assert found.position.tolist() == position.tolist()
    assert found.co_activation == pytest.approx(together / len(tokens))
    check_summary(found, tokens, load.sum(axis=0), knows_logits)
    for place, domain in enumerate(domains):
        check_summary(found.by_domain[place], domain, load[place], knows_logits)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_trace_equals_a_recount_token_by_token(name, domains, tokenizer):
    model = MODELS[name]().eval()
    # some of transformers' classes declare no router_logits in older releases
    knows_logits = sparse_layers(model)[0].router is not None
    assert knows_logits or name == "deepseek_v3"
    trace = trace_routing(model, tokenizer, domains, "tiny", TraceOptions(batch_size=3)).trace
    layers = [[[] for _ in domains] for _ in trace.layers]
    for place, (domain, rows) in enumerate(domains.items()):
        total = 0.0
        for ids in rows["input_ids"]:
            recorded, loss = record(model, name, ids)
            total += loss
            for layer, tokens in zip(layers, recorded, strict=True):
                layer[place] += tokens
        blocks = rows["input_ids"]
        assert trace.tokens[domain] == sum(map(len, blocks)) == len(layers[0][place])
        assert trace.losses[domain] == pytest.approx(total / (trace.tokens[domain] - len(blocks)), rel=1e-5)
    for found, expected in zip(trace.layers, layers, strict=True):
        check_layer(found, trace.position_edges, expected, knows_logits)
    flat = [[token.reached for domain in layer for token in domain] for layer in layers]
    for one, other, path in zip(flat, flat[1:], trace.paths, strict=False):
        pairs = Counter((a[0], b[0]) for a, b in zip(one, other, strict=True) if a and b)
        assert {(a, b): path[a, b] for a, b in zip(*np.nonzero(path), strict=True)} == pairs
    if name == "capacity":
        assert trace.layers[0].dropped_share > 0.05
    if name in ("null experts", "variable K"):
        assert trace.layers[0].mean_experts < 2.9


def split(blocks, seed):
    """Returns two domains of 16 blocks each, drawn at random from one text."""
    order = np.random.default_rng(seed).permutation(len(blocks))[:32]
    return {"a": blocks.select(order[:16]), "b": blocks.select(order[16:])}


def test_one_text_in_two_fake_domains_shows_no_specialisation(tokenizer):
    """A random router sends each token of the vocabulary its own way, so that tokens of one block are correlated."""
    text = datasets.Dataset.from_dict({"text": [sample_text(120)]})
    blocks, model = pack(text, tokenizer, 24, for_scoring=True), tiny_model(num_experts_per_tok=2)
    found = 0
    for seed in range(20):
        options = TraceOptions(batch_size=64, texts=0, top_tokens=0, seed=seed)
        trace = trace_routing(model, tokenizer, split(blocks, seed), "tiny", options).trace
        found += any(layer.significant.any() for layer in trace.layers)
    assert found <= 3  # of 20 runs at 5 %, more than 3 have a chance of 1.6 %


def test_domains_of_different_words_show_specialisation(tokenizer):
    """Even a random router sends different words to different experts."""
    lines = {"a": "der Weg führt über die Brücke. ", "b": "to the old mill 🙂. "}
    rows = {name: datasets.Dataset.from_dict({"text": [line * 80]}) for name, line in lines.items()}
    domains = {name: pack(row, tokenizer, 24, for_scoring=True) for name, row in rows.items()}
    trace = trace_routing(tiny_model(num_experts_per_tok=2), tokenizer, domains, "tiny", TraceOptions(texts=0)).trace
    for layer in trace.layers:
        assert layer.significant.any()
        share = layer.load / layer.load.sum(axis=1, keepdims=True)
        assert np.sign(layer.specialisation) == pytest.approx(np.sign(share - share.mean(axis=0)))
    assert "stretches of text" in trace.facts["Test of specialisation"]
    assert "too little" not in trace.facts["Test of specialisation"]
    short = {name: rows.select(range(2)) for name, rows in domains.items()}
    few = trace_routing(tiny_model(), tokenizer, short, "tiny", TraceOptions(texts=0)).trace
    assert "permutes 2 + 2 stretches" in few.facts["Test of specialisation"]
    assert "too little text to find anything" in few.facts["Test of specialisation"]
    assert not any(layer.significant.any() for layer in few.layers)


def test_a_traced_text_shows_each_token(domains, tokenizer):
    model = tiny_model(num_experts_per_tok=2).eval()
    options = TraceOptions(batch_size=2, texts=2, text_tokens=20)
    trace = trace_routing(model, tokenizer, domains, "tiny", options).trace
    assert [text.domain for text in trace.texts] == ["a", "a", "b", "b"]
    for text, (domain, block) in zip(trace.texts, [("a", 0), ("a", -1), ("b", 0), ("b", -1)], strict=True):
        ids = domains[domain]["input_ids"][block]
        layers, _ = record(model, "topk", ids)
        shown = min(20, len(ids))
        assert text.tokens == token_texts(tokenizer, ids[:shown])
        assert text.index.shape == text.weight.shape == (2, shown, 2)
        assert text.index.dtype == np.int32
        for place, tokens in enumerate(layers):
            for row, token in enumerate(tokens[:shown]):
                order = np.argsort(-text.weight[place, row])
                assert text.index[place, row][order].tolist() == token.reached
                assert text.margin[place, row] == pytest.approx(margin(token), abs=1e-6)
        assert text.weight.sum(axis=-1) == pytest.approx(np.ones((2, shown)), abs=1e-6)


def test_empty_assignments_are_minus_one_and_the_weight_of_dropped_ones_is_no_number(domains, tokenizer):
    options = TraceOptions(texts=1)
    variable = trace_routing(MODELS["variable K"](), tokenizer, domains, "tiny", options).trace.texts[0]
    assert (variable.index == -1).any()
    assert variable.index.min() == -1
    assert (variable.weight[variable.index == -1] == 0).all()
    dropped = trace_routing(MODELS["capacity"](), tokenizer, domains, "tiny", options).trace.texts[0]
    assert np.isnan(dropped.weight).any()
    assert (dropped.index[np.isnan(dropped.weight)] >= 0).all()
    assert np.nanmin(dropped.weight) > 0


def test_a_token_that_a_layer_skips_has_empty_assignments(domains, tokenizer):
    model = tiny_model(num_experts_per_tok=2, depth_layers=[0, 1, 1], mlp_layer_types=["sparse"] * 3).eval()
    trace = trace_routing(model, tokenizer, domains, "tiny", TraceOptions(batch_size=3, texts=1, text_tokens=20)).trace
    assert trace.layers[0].by_domain[0].mean_experts == 2
    ids = [torch.tensor([ids]) for rows in domains.values() for ids in rows["input_ids"]]
    outputs = [model(one, output_router_logits=True) for one in ids]
    for place, layer in enumerate(trace.layers):
        assert layer.load.sum(axis=0).tolist() == sum(one.expert_load[place] for one in outputs).tolist()
    for place, layer in enumerate(trace.layers[1:]):
        chosen = sum(int(one.depth_load[place]) for one in outputs)
        assert 0 < chosen < sum(trace.tokens.values())
        assert sum(layer.load.sum(axis=0)) == 2 * chosen
        logits = torch.cat([one.router_logits[place + 1] for one in outputs]).double()
        entropies = torch.special.entr(logits.softmax(-1)).sum(-1)
        summed = sum(
            found.token_entropy * found.mean_experts * trace.tokens[name] for name, found in of_domains(trace, layer)
        )
        assert summed == pytest.approx(2 * entropies.sum().item(), rel=1e-5)
        is_chosen = outputs[0].depth_router_logits[place][:20, 0] > 0
        assert ((trace.texts[0].index[place + 1] >= 0).all(axis=-1) == is_chosen.numpy()).all()
        assert ((trace.texts[0].index[place + 1] == -1).all(axis=-1) == ~is_chosen.numpy()).all()


def of_domains(trace, layer):
    """Returns the name and the figures of a layer for each domain."""
    return zip(trace.domains, layer.by_domain, strict=True)


def test_attention_and_network_of_one_layer_have_names_of_their_own(domains, tokenizer):
    routed = {"routed_attention": "moa", "attention_experts": 4, "attention_experts_per_tok": 2}
    trace = trace_routing(tiny_model(**routed).eval(), tokenizer, domains, "tiny").trace
    assert [layer.label for layer in trace.layers] == ["0 self_attn", "0 mlp", "1", "2 self_attn", "2 mlp"]
    assert [layer.num_experts for layer in trace.layers] == [4, 5, 4, 4, 5]
    assert trace.facts["Router"] == "moa in attention; topk"
    assert "layer 2 self_attn" in worst_layer(replace(trace, layers=trace.layers[3:4]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_does_not_change_a_trace(batch_size, domains, tokenizer):
    traces = [
        trace_routing(MODELS["capacity"](), tokenizer, domains, "tiny", TraceOptions(batch_size=size)).trace
        for size in (batch_size, 64)
    ]
    for one, other in zip(traces[0].layers, traces[1].layers, strict=True):
        assert one.load.tolist() == other.load.tolist()
        assert one.top_tokens == other.top_tokens
        assert one.significant.tolist() == other.significant.tolist()


def test_top_tokens_are_those_of_a_recount(domains, tokenizer):
    model = tiny_model(num_experts_per_tok=2).eval()
    trace = trace_routing(model, tokenizer, domains, "tiny", TraceOptions(top_tokens=4)).trace
    ids = [token for rows in domains.values() for block in rows["input_ids"] for token in block]
    layers = [[], []]
    for rows in domains.values():
        for block in rows["input_ids"]:
            for layer, tokens in zip(layers, record(model, "topk", block)[0], strict=True):
                layer += tokens
    total = Counter(ids)
    for found, tokens in zip(trace.layers, layers, strict=True):
        for expert, listed in enumerate(found.top_tokens):
            taken = Counter(token for token, seen in zip(ids, tokens, strict=True) if expert in seen.reached)
            frequent = {
                t: lower_bound(np.array(n), np.array(total[t]))
                for t, n in taken.items()
                if total[t] >= MIN_OCCURRENCES
            }
            best = sorted(frequent.values(), reverse=True)[:4]
            expected = {(token_label(tokenizer, t), taken[t], taken[t] / total[t]) for t in frequent}
            assert [lower_bound(np.array(t.count), np.array(t.count / t.share)) for t in listed] == pytest.approx(best)
            assert {(t.token, t.count, t.share) for t in listed} <= expected
            assert all(t.context[1] for t in listed)
    assert any(token.context[0] and token.context[2] for token in trace.layers[0].top_tokens[0])


def test_a_rare_token_does_not_win_by_chance():
    taken, occurrences = np.array([8, 99, 500]), np.array([8, 100, 1000])
    bound = lower_bound(taken, occurrences)
    assert bound[1] > bound[0] > bound[2]
    assert bound[0] == pytest.approx(8 / (8 + 1.96**2))


def test_tokens_that_choose_all_experts_have_no_margin(domains, tokenizer):
    trace = trace_routing(
        tiny_model(num_experts=4, num_experts_per_tok=4), tokenizer, domains, "tiny", TraceOptions(texts=1)
    ).trace
    assert [layer.gate_margin for layer in trace.layers] == [None, None]
    assert all(layer.token_entropy > 0 for layer in trace.layers)
    assert trace.texts[0].margin is None


def test_a_small_domain_beside_a_large_one_is_no_specialisation(tokenizer):
    """One text cut into 4 blocks and 640; units of 1 and of 10 blocks would make a finding in most runs."""
    random, found = np.random.default_rng(0), 0
    for seed in range(20):
        texts = Texts([[np.arange(64)] * 4, [np.arange(64)] * 640], 0)
        assert np.bincount(texts.unit_domain[: texts.tested]).tolist() == [4, 64]
        load = np.zeros((len(texts.unit_domain), 8), np.int64)
        blocks = random.multinomial(64, random.dirichlet(np.full(8, 20.0), size=644))
        np.add.at(
            load,
            np.concatenate([texts.batch(0, range(4))[1].places.unit, texts.batch(1, range(640))[1].places.unit])[::64],
            blocks,
        )
        assert load.sum() == 644 * 64
        labels = texts.unit_domain[: texts.tested]
        found += any(cells.any() for cells in significant_cells([load[: texts.tested]], labels, seed))
    assert found <= 3  # of 20 runs at 5 %, more than 3 have a chance of 1.6 %


def test_a_domain_shorter_than_a_block_is_not_tested_and_the_facts_say_so(domains, tokenizer):
    short = domains | {"a": datasets.Dataset.from_dict({"input_ids": [domains["a"]["input_ids"][0][:5]]})}
    trace = trace_routing(tiny_model(), tokenizer, short, "tiny", TraceOptions(texts=0)).trace
    assert "a domain is shorter than one block" in trace.facts["Test of specialisation"]
    assert not any(layer.significant.any() for layer in trace.layers)
    assert sum(trace.layers[0].load[0]) == 5 * trace.layers[0].top_k


def test_margins_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2]]).expand(4, 3)
    assert margins(probs, torch.tensor([0, 1, 2, 3])).tolist() == pytest.approx([0.0, 0.2, 0.1, 0.0])


def test_a_model_against_itself_moves_nothing_and_a_damaged_router_moves(domains, tokenizer):
    options = TraceOptions(keeps_sets=True)
    model = tiny_model(num_experts_per_tok=2)
    first = trace_routing(model, tokenizer, domains, "tiny", options)
    same = compare_traces(first, trace_routing(tiny_model(num_experts_per_tok=2), tokenizer, domains, "tiny", options))
    assert [change.changed_tokens for change in same.layers] == [0, 0]
    assert all(change.load_shift.tolist() == [0, 0] for change in same.layers)
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight.neg_()
    moved = trace_routing(model, tokenizer, domains, "tiny", options)
    changes = compare_traces(first, moved)
    assert [change.layer for change in changes.layers] == [0, 2]
    assert changes.layers[0].changed_tokens == 0
    differ = sum(
        set(one.reached) != set(other.reached)
        for rows in domains.values()
        for block in rows["input_ids"]
        for one, other in zip(
            record(tiny_model(num_experts_per_tok=2).eval(), "topk", block)[0][1],
            record(model, "topk", block)[0][1],
            strict=True,
        )
    )
    assert changes.layers[1].changed_tokens == pytest.approx(differ / sum(moved.trace.tokens.values()))
    assert differ > 0
    assert "same tokens" in changes.note


def test_models_that_do_not_compare_are_told(domains, tokenizer):
    options = TraceOptions(keeps_sets=True)
    first = trace_routing(tiny_model(), tokenizer, domains, "tiny", options)
    more = trace_routing(tiny_model(num_experts=6), tokenizer, domains, "tiny", options)
    assert compare_traces(first, more).layers == []
    assert "differ in the number of experts" in compare_traces(first, more).note
    deeper = trace_routing(tiny_model(mlp_layer_types=["sparse"] * 3), tokenizer, domains, "tiny", options)
    assert "2 and 3 sparse layers" in compare_traces(first, deeper).note
    shorter = {name: rows.select(range(len(rows) - 1)) for name, rows in domains.items()}
    other = compare_traces(first, trace_routing(tiny_model(), tokenizer, shorter, "tiny", options))
    assert [change.changed_tokens for change in other.layers] == [None, None]
    assert "cut the texts differently" in other.note


def test_the_shift_of_loads_by_hand():
    assert load_shift(np.array([[3, 1], [2, 0]]), np.array([[1, 3], [0, 9]])) == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("router", ["soft_moe", "lory"])
def test_a_router_that_mixes_is_refused_in_one_sentence(router, domains, tokenizer):
    model = tiny_model(router_type=router, allow_noncausal=True, num_experts_per_tok=5)
    with pytest.raises(UnreachableRouting, match="sends no tokens to experts"):
        trace_routing(model, tokenizer, domains, "tiny")


FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    "glm4_moe",
    "minimax_m2",
    "gemma4",
    "lfm2_moe",
    "inkling2_loop",
    "ernie4_5_vl_moe",
    "zaya",
]


def check_family(family, tokenizer):
    """Compares the trace of a family's tiny model with what [`modeling_moe.watch`] sums up on the same blocks."""
    model = tiny_family(family).eval()
    sharpen(model)
    blocks = torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(0)).tolist()
    domains = {"a": blocks[:4], "b": blocks[4:]}
    rows = {name: datasets.Dataset.from_dict({"input_ids": ids}) for name, ids in domains.items()}
    trace = trace_routing(model, tokenizer, rows, family, TraceOptions(batch_size=4)).trace
    with watch(model) as recorder, torch.no_grad():
        model(input_ids=torch.tensor(blocks), use_cache=False)
    figures = {layer.name: layer for layer in recorder.read().layers if layer.tokens}
    assert [layer.name for layer in trace.layers] == list(figures)
    for layer in trace.layers:
        expected = figures[layer.name]
        assert layer.load.sum(axis=0).tolist() == expected.load.tolist()
        assert layer.max_violation == pytest.approx(expected.max_violation)
        assert layer.co_activation == pytest.approx(expected.co_activation.numpy(), abs=1e-6)
        for name in ("token_entropy", "marginal_entropy", "gate_margin"):
            found, other = getattr(layer, name), getattr(expected, name)
            assert found == (None if other is None else pytest.approx(other, rel=1e-4, abs=1e-7))
    assert trace.texts[0].index.shape[0] == len(trace.layers) == len(trace.paths) + 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in experts_families()])
def test_popular_families_are_traced(family, tokenizer):
    check_family(family, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*experts_families()} - {*FAMILIES, "deepseek_ocr2", "glm5_next"}))
def test_every_family_is_traced(family, tokenizer):
    """The two families that are left out have no tiny model with experts here."""
    check_family(family, tokenizer)


def test_experts_that_text_does_not_reach_are_told(domains, tokenizer, monkeypatch):
    """A model that skips its experts, or those of some batches, gives one sentence and no half a report."""
    model, calls = tiny_model(), []
    first, last = (layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts"))
    monkeypatch.setattr(last, "forward", lambda states, *args, **kwargs: (states, None, None))
    trace = trace_routing(model, tokenizer, domains, "tiny", TraceOptions(texts=1)).trace
    assert [layer.layer for layer in trace.layers] == [0]
    assert trace.paths == []
    assert trace.texts[0].index.shape[0] == 1

    def skip_later(states, *args, **kwargs):
        calls.append(1)
        return type(last).forward(last, states, *args, **kwargs) if len(calls) < 3 else (states, None, None)

    monkeypatch.setattr(last, "forward", skip_later)
    with pytest.raises(UnreachableRouting, match="experts of 1 and 2 layers in two batches"):
        trace_routing(model, tokenizer, domains, "tiny", TraceOptions(batch_size=1))
    for block in (first, last):
        monkeypatch.setattr(block, "forward", lambda states, *args, **kwargs: (states, None, None))
    with pytest.raises(UnreachableRouting, match=r"does not call its experts \(model.layers.0.mlp.experts\)"):
        trace_routing(model, tokenizer, domains, "tiny")


def test_hooks_do_not_stay(domains, tokenizer):
    model = tiny_model()
    trace_routing(model, tokenizer, domains, "tiny")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_characters_of_several_tokens_belong_to_the_first(tokenizer):
    """A tokenizer of bytes alone cuts 日 into three tokens and 🙂 into four."""
    ids = tokenizer.convert_tokens_to_ids([bytes_to_unicode()[byte] for byte in "a日🙂b".encode()])
    assert len(ids) == 1 + 3 + 4 + 1
    assert token_texts(tokenizer, ids) == ["a", "日", "…", "…", "🙂", "…", "…", "…", "b"]
    cut = token_texts(tokenizer, ids[2:])
    assert cut == ["\ufffd", "\ufffd", "🙂", "…", "…", "…", "b"]
    assert token_texts(tokenizer, ids[:6]) == ["a", "日", "…", "…", "\ufffd", "\ufffd"]
    broken = tokenizer.convert_tokens_to_ids([bytes_to_unicode()[byte] for byte in b"a\x97\xf0\x9fbc"])
    assert token_texts(tokenizer, broken) == ["a", "\ufffd", "\ufffd", "\ufffd", "b", "c"]
    assert token_texts(tokenizer, []) == []
    assert [token_label(tokenizer, token) for token in ids[:3]] == ["a", "<E6>", "<97>"]


def test_the_texts_of_tokens_join_to_the_text(tokenizer):
    text = "führt über\n\nthe  old <b>mill</b>\t\x07 </script> \u202e x" + "y" * 10_000
    assert "".join(token_texts(tokenizer, tokenizer(text)["input_ids"])).replace("…", "") == text


def test_sentencepiece_keeps_its_spaces_and_shows_bytes():
    pieces = ["<unk>", "\u2581the", "\u2581", "old", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [
        pieces.index(piece)
        for piece in ("\u2581the", "\u2581the", "old", "<0xE6>", "<0x97>", "<0xA5>", "\u2581the", "<0xFF>")
    ]
    assert token_texts(tokenizer, ids) == ["the", " the", "old", "日", "…", "…", " the", "\ufffd"]
    assert token_label(tokenizer, 1) == " the"
    assert token_label(tokenizer, pieces.index("<0xE6>")) == "<E6>"


def test_a_tokenizer_that_cannot_decode_is_told_in_one_sentence(domains, tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("no such piece")

    monkeypatch.setattr(tokenizer, "decode", fail)
    with pytest.raises(ValueError, match="the tokenizer cannot turn its own tokens into text: 'no such piece'"):
        trace_routing(tiny_model(), tokenizer, domains, "tiny")
