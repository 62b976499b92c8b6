"""These tests recount a trace token by token from what the routers returned, and look at the texts of tokens."""

import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from modeling_moe.data import pack
from modeling_moe.monitoring import TraceOptions, UnreachableRouting, compare_traces, trace_routing
from modeling_moe.monitoring.comparing import load_shift
from modeling_moe.monitoring.layer_sums import margins
from modeling_moe.monitoring.token_texts import token_label, token_texts
from modeling_moe.monitoring.top_tokens import MIN_OCCURRENCES, lower_bound
from tests.builders import SIZE, sample_text, tiny_model, train_tokenizer


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


class Recorded:
    """What experts and routers of a model received and returned, one block after another, in float64."""

    def __init__(self, model, blocks):
        self.calls, self.routings = [], []
        experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
        self.count = [module.num_experts for module in experts]
        handles = [module.register_forward_pre_hook(self._call, with_kwargs=True) for module in experts]
        gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate") and name.count(".") == 4]
        handles += [gate.register_forward_hook(lambda _, __, output: self.routings.append(output)) for gate in gates]
        self.losses, self.scored = 0.0, 0
        with torch.no_grad():
            for ids in blocks:
                ids = torch.tensor([ids])
                logits = model(input_ids=ids).logits[0, :-1].double()
                self.losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                self.scored += len(logits)
        for handle in handles:
            handle.remove()

    def _call(self, module, args, kwargs):
        values = [*args, *kwargs.values()]
        self.calls.append((values[1], values[2]))

    def layer(self, number):
        """Yields for each token of a layer the chosen ids, the arrived ids, the weights and the probabilities or None."""
        layers = len(self.count)
        for arrived, weight in self.calls[number::layers]:
            block = len(arrived)
            routing = self.routings[len(self.calls[:0]) + number] if self.routings else None
            yield from ((arrived[row].tolist(), weight[row].double().tolist()) for row in range(block)), routing


@pytest.mark.parametrize("name", list(MODELS))
def test_a_trace_equals_a_recount_token_by_token(name, domains, tokenizer):
    model = MODELS[name]().eval()
    options = TraceOptions(batch_size=3, texts=2, text_tokens=20, keeps_sets=True)
    trace, blocks, sets = trace_routing(model, tokenizer, domains, "tiny", options)
    recorded = {domain: Recorded(model, rows["input_ids"]) for domain, rows in domains.items()}
    assert trace.losses == pytest.approx({key: value.losses / value.scored for key, value in recorded.items()}, rel=1e-5)
    assert trace.tokens == {domain: sum(map(len, rows["input_ids"])) for domain, rows in domains.items()}
    ours = name not in ("mixtral", "deepseek_v3")
    tokens = sum(trace.tokens.values())
    firsts = []
    for number, layer in enumerate(trace.layers):
        experts = layer.num_experts
        load, position, together = np.zeros((2, experts)), np.zeros_like(layer.position), np.zeros((experts, experts))
        first, shown, dropped, chosen_count, probabilities, gaps = [], [], 0, 0, [], []
        for place, found in enumerate(recorded.values()):
            layers = len(found.count)
            calls = found.calls[number::layers]
            routings = found.routings[number::layers]
            for call, routing in zip(calls, routings, strict=True):
                arrived, weight = call
                for row in range(len(arrived)):
                    # a list of the experts with weights that the token reaches
                    reached = [int(e) for e in arrived[row] if e < experts]
                    by_weight = [(-float(w), slot) for slot, (e, w) in enumerate(zip(arrived[row], weight[row], strict=True)) if e < experts]
                    first.append(int(arrived[row][min(by_weight)[1]]) if by_weight else -1)
                    for expert in reached:
                        load[place, expert] += 1
                        edge = max(p for p, start in enumerate(trace.position_edges[:-1]) if start <= row)
                        position[edge, expert] += 1
                    for one in set(reached):
                        for other in set(reached):
                            together[one, other] += 1
                    if ours:
                        chosen = [int(e) for e in routing.index[row] if e < experts]
                        outputs = int((routing.index[row] < routing.probs.shape[-1]).sum())
                        probs = sorted(routing.probs[row].double().tolist(), reverse=True)
                        chosen_count += len(chosen)
                        dropped += len(chosen) - len(reached)
                        probabilities.append(routing.probs[row].double())
                        gaps.append(probs[outputs - 1] - probs[outputs] if 0 < outputs < len(probs) else 0.0)
        assert layer.load.tolist() == load.tolist()
        assert layer.position.tolist() == position.tolist()
        assert layer.co_activation == pytest.approx(together / tokens)
        assert layer.mean_experts == pytest.approx(load.sum() / tokens)
        assert layer.max_violation == pytest.approx(load.sum(0).max() / load.sum(0).mean() - 1)
        assert layer.dead_experts == pytest.approx((load.sum(0) == 0).mean())
        for place, summary in enumerate(layer.by_domain):
            assert summary.max_violation == pytest.approx(load[place].max() / load[place].mean() - 1)
        firsts.append(first)
        if ours:
            assert layer.dropped_share == pytest.approx(dropped / max(chosen_count, 1))
            stacked = torch.stack(probabilities)
            entropy = [-sum(p * math.log(p) for p in row.tolist() if p > 0) for row in stacked]
            assert layer.token_entropy == pytest.approx(np.mean(entropy), rel=1e-5)
            mean = stacked.mean(dim=0)
            assert layer.marginal_entropy == pytest.approx(-(mean[mean > 0].log() * mean[mean > 0]).sum().item(), rel=1e-5)
            assert layer.gate_margin == pytest.approx(np.mean(gaps), rel=1e-4, abs=1e-9)
    for one, other, path in zip(firsts, firsts[1:], trace.paths, strict=False):
        pairs = Counter((a, b) for a, b in zip(one, other, strict=True) if a >= 0 and b >= 0)
        assert {(a, b): int(path[a, b]) for a, b in zip(*np.nonzero(path), strict=True)} == dict(pairs)
    assert len(trace.paths) == len(trace.layers) - 1
    assert sets is not None
    assert sets.shape == (len(trace.layers), tokens)
