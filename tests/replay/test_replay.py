"""These tests replay recorded experts in this package's model and in transformers' own, against routers written out here."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.monitoring import observe
from modeling_moe.replay import RoutingStore, record_routing, replay_routing
from modeling_moe.replay.selection import Selection
from modeling_moe.router_catalogue import ROUTERS
from tests.builders import SIZE, tiny_model


EXPERTS = {
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZE | EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZE | EXPERTS, head_dim=8),
    "olmoe": OlmoeConfig(**SIZE | EXPERTS),
    "deepseek_v2": DeepseekV2Config(
        **SIZE | EXPERTS | LATENT, topk_method="group_limited_greedy", n_group=3, topk_group=1, first_k_dense_replace=0
    ),
    "deepseek_v3": DeepseekV3Config(**SIZE | EXPERTS | LATENT, n_group=3, topk_group=1, first_k_dense_replace=1),
    "gpt_oss": GptOssConfig(**SIZE | EXPERTS, head_dim=8),
    "moe": MoEConfig(**SIZE | EXPERTS, head_dim=8),
    "moe, groups": MoEConfig(
        **SIZE | EXPERTS, scoring_func="sigmoid", n_group=3, topk_group=1, router_selection_bias=True
    ),
    "moe, top_p": MoEConfig(**SIZE | EXPERTS, router_type="top_p"),
    "moe, null experts": MoEConfig(**SIZE | EXPERTS, num_null_experts=2),
}


# these routers choose while they weigh
REFUSED = {"sparsemixer", "hierarchical"}


def model_of(name: str, seed: int = 0) -> nn.Module:
    """Returns a model whose routers choose different experts for different tokens."""
    torch.manual_seed(seed)
    return (
        AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), experts_implementation="eager").double().eval()
    )


def texts(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def chosen(model, **inputs) -> list[torch.Tensor]:
    """Returns the experts (T, K) of each sparse layer."""
    found = []
    with observe(model, lambda event: found.append(event.index.clone())), torch.no_grad():
        model(**inputs, use_cache=False)
    return found


def sets_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.long().sort(-1).values, other.long().sort(-1).values)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_replays_its_own_choice_bitwise_and_another_models_choice_exactly(name):
    model, other, ids = model_of(name), model_of(name, seed=5), texts()
    with record_routing(model) as recorder, torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    with replay_routing(model, recorder.store) as replay, torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, wanted)
        figures = replay.figures()
    assert figures == (1, 0)
    mine, theirs = chosen(model, input_ids=ids), chosen(other, input_ids=ids)
    assert not all(sets_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    with replay_routing(other, recorder.store) as replay:
        replayed = chosen(other, input_ids=ids)
        assert all(torch.equal(a.long(), b.long()) for a, b in zip(mine, replayed, strict=True))
        assert 0 < replay.figures().flipped <= 1
    assert all(torch.equal(a, b) for a, b in zip(chosen(other, input_ids=ids), theirs, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_router_gets_a_gradient_through_each_replayed_expert(name):
    model, other, ids = model_of(name), model_of(name, seed=5), texts()
    with record_routing(model) as recorder, torch.no_grad():
        model(ids, use_cache=False)
    weights = []
    with (
        replay_routing(other, recorder.store),
        observe(other, lambda event: weights.append((event.weight, event.index))),
    ):
        other(ids, use_cache=False, labels=ids).loss.backward()
    for weight, index in weights:
        assert (weight[index < 6] > 0).all()
    routers = [value for key, value in other.named_parameters() if ".gate." in key or ".router." in key]
    assert routers
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in routers if value.requires_grad)


def test_deepseek_v3_gradients_equal_a_router_that_gathers_the_record(monkeypatch):
    model, other, ids = model_of("deepseek_v3"), model_of("deepseek_v3", seed=5), texts()
    for one in (model, other):
        for name, bias in one.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.linspace(-0.3, 0.3, 6, dtype=bias.dtype))
    with record_routing(model) as recorder:
        recorded = chosen(model, input_ids=ids)
    with replay_routing(other, recorder.store):
        logits = other(ids, use_cache=False).logits
    logits.square().sum().backward()
    got = {key: value.grad.clone() for key, value in other.named_parameters() if value.grad is not None}
    other.zero_grad()
    queue = list(recorded)

    def forward(self, hidden_states):
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(states.float(), self.weight.float())
        index = queue.pop(0)
        weight = logits.sigmoid().gather(1, index)
        if self.norm_topk_prob:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return logits, weight * self.routed_scaling_factor, index

    monkeypatch.setattr(DeepseekV3TopkRouter, "forward", forward)
    wanted = other(ids, use_cache=False).logits
    wanted.square().sum().backward()
    torch.testing.assert_close(logits, wanted)
    assert any(".gate." in key for key in got)
    for key, value in got.items():
        torch.testing.assert_close(value, other.get_parameter(key).grad, rtol=1e-6, atol=1e-9)


def test_logits_and_gradients_equal_a_router_that_gathers_the_record(monkeypatch):
    model, other, ids = model_of("mixtral"), model_of("mixtral", seed=5), texts()
    with record_routing(model) as recorder:
        recorded = chosen(model, input_ids=ids)
    with replay_routing(other, recorder.store):
        logits = other(ids, use_cache=False).logits
    logits.square().sum().backward()
    got = {key: value.grad.clone() for key, value in other.named_parameters()}
    other.zero_grad()
    queue = list(recorded)

    def forward(self, hidden_states):
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = nn.functional.linear(states, self.weight)
        index = queue.pop(0)
        weight = scores.softmax(-1, dtype=torch.float).gather(-1, index)
        return scores, weight / weight.sum(-1, keepdim=True), index

    monkeypatch.setattr(MixtralTopKRouter, "forward", forward)
    wanted = other(ids, use_cache=False).logits
    wanted.square().sum().backward()
    assert torch.equal(logits, wanted)
    for key, value in other.named_parameters():
        torch.testing.assert_close(got[key], value.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "moe"])
def test_generation_is_recorded_and_found_again_in_padded_shuffled_packed_and_cut_batches(name):
    model = model_of(name)
    prompts, mask = texts(3, 6), torch.ones(3, 6, dtype=torch.long)
    prompts[1, :2], mask[1, :2] = 0, 0
    with record_routing(model) as recorder:
        written = model.generate(
            input_ids=prompts, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, do_sample=False
        )
    rows = [row[start:] for row, start in zip(written, (0, 2, 0), strict=True)]
    assert len(recorder.store) == 3
    alone = [chosen(model, input_ids=row[None]) for row in rows]
    for row, layers in zip(rows, alone, strict=True):
        found = recorder.store.find(row)
        assert len(found) == len(row) - 1  # the last token was never an input
        for place, index in enumerate(layers):
            assert sets_equal(found[:, place], index[:-1])

    other = model_of(name, seed=5)
    padded = torch.zeros(3, 15, dtype=torch.long)
    for place, row in enumerate((rows[1], rows[2], rows[0][:9])):
        padded[place, : len(row)] = row
    with replay_routing(other, recorder.store) as replay:
        got = chosen(other, input_ids=padded, attention_mask=(padded > 0).long())
        assert replay.figures().coverage == pytest.approx((10 + 12 + 9) / (11 + 13 + 9))
        packed = torch.cat([rows[2], rows[0]])[None]
        positions = torch.cat([torch.arange(len(rows[2])), torch.arange(len(rows[0]))])[None]
        together = chosen(other, input_ids=packed, position_ids=positions)
    for place in range(len(got)):
        grid = got[place].view(3, 15, -1)
        assert sets_equal(grid[0, :10], alone[1][place][:-1])
        assert sets_equal(grid[1, :12], alone[2][place][:-1])
        assert sets_equal(grid[2, :9], alone[0][place][:9])
        assert sets_equal(together[place][:12], alone[2][place][:-1])
        assert sets_equal(together[place][13:25], alone[0][place][:-1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "moe"])
def test_a_repeated_pass_of_checkpointing_replays_too(name, reentrant):
    ids, gradients = texts(), []
    with record_routing(model_of(name)) as recorder, torch.no_grad():
        recorder._model(ids, use_cache=False)
    for checkpointing in (False, True):
        other = model_of(name, seed=5).train()
        if checkpointing:
            other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            other.enable_input_require_grads()
        with replay_routing(other, recorder.store):
            losses = [other(part, labels=part, use_cache=False).loss for part in ids.split([2, 1])]
            sum(losses).backward()
        gradients.append([value.grad for value in other.parameters() if value.grad is not None])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_a_choice_that_is_not_recorded_stays_the_routers_own():
    model, ids = model_of("mixtral"), texts()
    store, own = RoutingStore(), chosen(model, input_ids=ids)
    experts = torch.full((11, 2, 2), -1)
    experts[4] = torch.tensor([[5, 0], [1, 3]])
    store.add(ids[1], experts)
    with replay_routing(model, store):
        got = chosen(model, input_ids=ids)
    for layer, (one, two) in enumerate(zip(own, got, strict=True)):
        if layer == 0:
            assert torch.equal(torch.cat([one[:15], one[16:]]), torch.cat([two[:15], two[16:]]))
        assert two[15].tolist() == experts[4, layer].tolist()


def test_misuse_is_refused():
    store, ids = RoutingStore(), texts(1)
    with pytest.raises(ValueError, match=r"must be \(S,\) and"):
        store.add(ids, torch.zeros(11, 2, 2))
    with pytest.raises(ValueError, match="max_bytes is 0"):
        RoutingStore(0)
    store.add(ids[0], torch.zeros(11, 3, 2, dtype=torch.long))
    model = model_of("mixtral")
    with replay_routing(model, store), pytest.raises(ValueError, match="3 sparse layers where the model has 2"):
        model(ids, use_cache=False)


def test_layers_may_differ_in_the_number_of_experts_of_a_token():
    model, other, ids = model_of("mixtral"), model_of("mixtral", seed=5), texts()
    for one in (model, other):
        one.model.layers[1].mlp.gate.top_k = 3
    with record_routing(model) as recorder:
        mine = chosen(model, input_ids=ids)
    assert [index.shape[-1] for index in mine] == [2, 3]
    assert recorder.store.find(ids[0]).shape == (11, 2, 3)
    with replay_routing(other, recorder.store) as replay:
        replayed = chosen(other, input_ids=ids)
        assert replay.figures().coverage == 1
    assert all(torch.equal(one.long(), two.long()) for one, two in zip(mine, replayed, strict=True))
    for wider, message in (
        (0, "has more experts of a token than the 2"),
        (1, "3 experts of a token where the router chooses 4"),
    ):
        other = model_of("mixtral")
        other.model.layers[1].mlp.gate.top_k = 2 + 2 * wider
        with replay_routing(other, recorder.store), pytest.raises(ValueError, match=message):
            other(ids, use_cache=False)


@pytest.mark.parametrize("trained_copy", [False, True])
def test_a_router_inside_layers_of_peft_is_replayed(trained_copy):
    model, other, ids = tiny_model().eval(), None, texts()
    torch.manual_seed(9)
    other = MoEForCausalLM(model.config).eval()
    copies = {"modules_to_save": ["mlp.gate"]} if trained_copy else {}
    other = get_peft_model(other, LoraConfig(target_modules=["q_proj"], **copies))
    with record_routing(model) as recorder:
        mine = chosen(model, input_ids=ids)
    with replay_routing(other, recorder.store):
        replayed = chosen(other, input_ids=ids)
        other(ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.equal(one.long(), two.long()) for one, two in zip(mine, replayed, strict=True))
    trained = [value.grad for key, value in other.named_parameters() if ".gate." in key and value.requires_grad]
    assert len(trained) == 2 * trained_copy
    assert all(value.abs().sum() > 0 for value in trained)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_replays_and_counts_what_an_eager_one_does(name, backend):
    model, other, ids = model_of(name), model_of(name, seed=5), texts()
    with record_routing(model) as recorder, torch.no_grad():
        model(ids, use_cache=False)
    with replay_routing(other, recorder.store) as replay, torch.no_grad():
        wanted = other(ids, use_cache=False).logits
        figures = replay.figures()
        assert figures.flipped > 0
        torch._dynamo.reset()
        compiled = torch.compile(other, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted)
            assert replay.figures() == figures


@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_of_this_package_uses_the_recorded_experts_or_is_refused(router):
    fields = {"router_type": router, "num_experts": 6, "num_experts_per_tok": 2}
    fields |= {"allow_noncausal": True} if not ROUTERS[router].causal else {}
    fields |= {"n_group": 2, "topk_group": 2} if router == "hierarchical" else {}
    fields |= {"num_experts_per_tok": {"uniform": 6, "base_layer": 1}.get(router, 2)}
    fields |= {"num_tasks": 2} if router in ("task", "mmoe") else {}
    model, other = tiny_model(**fields).eval(), None
    torch.manual_seed(9)
    other = MoEForCausalLM(model.config).eval()
    ids, inputs = texts(), {"task_ids": torch.tensor([0, 1, 1])} if "num_tasks" in fields else {}
    with record_routing(model) as recorder:
        mine = chosen(model, input_ids=ids, **inputs)
    refused = router in REFUSED
    outcome = pytest.raises(ValueError, match="does not choose by the scores") if refused else nullcontext()
    with replay_routing(other, recorder.store), outcome:
        replayed = chosen(other, input_ids=ids, **inputs)
    if not refused:
        assert all(torch.equal(one.long(), two.long()) for one, two in zip(mine, replayed, strict=True))


def test_expert_ids_of_more_than_16_bits_are_kept():
    fields = {"num_experts": 2**15 + 64, "num_experts_per_tok": 2, "moe_intermediate_size": 1, "num_hidden_layers": 1}
    model, chosen = MoEForCausalLM(MoEConfig(**SIZE | fields)).eval(), []
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[: 2**15] = 0  # each token chooses among the last 64
    with torch.no_grad(), record_routing(model) as recorder, observe(model, lambda event: chosen.append(event.index)):
        logits = model(ids := torch.arange(1, 7)[None], use_cache=False).logits
    found = recorder.store.find(ids[0])
    assert chosen[0].min() >= 2**15
    assert torch.equal(found[:, 0].long(), chosen[0])
    with torch.no_grad(), replay_routing(model, recorder.store) as replay:
        assert torch.equal(model(ids, use_cache=False).logits, logits)
        assert replay.figures() == (1.0, 0.0)


def test_the_store_forgets_the_oldest_texts_and_prefers_the_longest_agreement():
    store, experts = RoutingStore(max_bytes=600), torch.zeros(10, 2, 2, dtype=torch.long)
    for first in range(5):
        store.add(torch.arange(first, first + 10), experts + first)
    assert len(store) == 3
    assert store.nbytes == 3 * 160
    assert store.find(torch.arange(0, 10)) is None
    assert store.find(torch.arange(4, 14))[0, 0, 0] == 4
    store.clear()
    ids = torch.arange(12)
    store.add(ids[:9], experts[:9])
    store.add(ids[:11], experts + 1)
    assert store.find(ids)[0, 0, 0] == 1
    assert len(store.find(ids[:10])) == 10
    assert store.find(torch.cat([ids[:9], ids[:1]]))[0, 0, 0] == 0
    assert store.find(torch.cat([ids[:8], ids[:4]])) is None


def test_the_store_finds_what_a_search_over_all_texts_finds():
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, count: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=generator)

    for _ in range(20):
        store, added = RoutingStore(), []
        for number in range(20):
            begin = added[number // 2][0] if number else draw(2, 0)
            ids = torch.cat([begin[: draw(30, 1)], draw(2, 1 + int(draw(20, 1)))])
            added = [text for text in added if not torch.equal(text[0], ids)] + [(ids, number)]
            store.add(ids, torch.full((len(ids), 1, 1), number))
            asked = torch.cat([added[number // 2 - 1][0][: 1 + int(draw(30, 1))], draw(2, int(draw(3, 1)))])
            agreeing = []
            for text, one in added:
                shared = min(len(text), len(asked))
                if torch.equal(text[:shared], asked[:shared]):
                    agreeing.append((min(shared, max(len(asked) - 1, 1)), one))
            found = store.find(asked)
            assert (None if found is None else int(found[0, 0, 0])) == (max(agreeing)[1] if agreeing else None)


def test_a_text_is_found_without_a_look_at_all_texts_that_begin_alike(monkeypatch):
    store, template, compared = RoutingStore(), torch.arange(10), []
    for number in range(300):
        store.add(torch.cat([template, number + torch.arange(20)]), torch.zeros(30, 1, 1))
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: compared.append(pair) or equal(*pair))
    assert store.find(torch.cat([template, 7 + torch.arange(20)])) is not None
    assert len(compared) < 10


@pytest.mark.parametrize("name", ["mixtral", "moe"])
def test_a_loop_whose_first_pass_makes_the_cache_is_recorded(name):
    model, written = model_of(name), texts(2, 5)
    with record_routing(model) as recorder, torch.no_grad():
        output = model(written, use_cache=True)
        for _ in range(4):
            new = output.logits[:, -1:].argmax(dim=-1)
            written = torch.cat([written, new], dim=1)
            output = model(new, past_key_values=output.past_key_values, use_cache=True)
    alone = RoutingStore()
    with record_routing(model, alone), torch.no_grad():
        model(written, use_cache=False)
    for row in written:
        assert torch.equal(recorder.store.find(row).sort(-1).values, alone.find(row).sort(-1).values)


def test_one_of_two_recorders_that_ends_leaves_the_other_one_whole():
    model = model_of("mixtral")
    first, second = record_routing(model), record_routing(model)
    first.remove()
    first.remove()
    with pytest.raises(ValueError, match="num_beams=1"):
        model.generate(texts(1, 4), num_beams=2, max_new_tokens=2)
    second.remove()
    model.generate(texts(1, 4), num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_router_that_adds_the_scores_of_its_only_group_is_replayed(experts):
    CONFIGS["one group"] = DeepseekV3Config(
        **SIZE | EXPERTS | LATENT | {"num_experts_per_tok": experts}, n_group=1, topk_group=1, first_k_dense_replace=0
    )
    try:
        model, other = model_of("one group"), model_of("one group", seed=5)
    finally:
        del CONFIGS["one group"]
    with record_routing(model) as recorder:
        mine = chosen(model, input_ids=texts())
    with replay_routing(other, recorder.store) as replay:
        replayed = chosen(other, input_ids=texts())
    assert all(sets_equal(one, two) for one, two in zip(mine, replayed, strict=True))
    assert 0 < replay.figures().flipped < 1


def test_a_replay_whose_figures_nobody_reads_does_not_grow():
    model, other, ids = model_of("mixtral"), model_of("mixtral", seed=5), texts()

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    with record_routing(model) as recorder, torch.no_grad():
        model(ids, use_cache=False)
    with replay_routing(other, recorder.store) as replay, torch.no_grad():
        other(ids, use_cache=False)
        once, before = replay.figures(), held()
        for _ in range(5):
            other(ids, use_cache=False)
        after = held()
        assert replay.figures() == once
    assert 0 < once.flipped < 1
    assert after <= before + 1  # the sums of the device


def test_hooks_leave_the_model_as_it_was_after_an_error():
    model, ids = model_of("mixtral"), texts()
    with record_routing(model) as recorder, torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: 1 / 0)
    with replay_routing(model, recorder.store), pytest.raises(ZeroDivisionError):
        model(ids, use_cache=False)
    handle.remove()
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    assert scores.topk(2).indices.tolist() == [[1, 2]]
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, wanted)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_short_texts_and_the_newest_of_texts_that_agree_are_found():
    store, ids = RoutingStore(), torch.arange(20)
    for number, length in enumerate((12, 6)):
        store.add(ids[:length], torch.full((length, 1, 1), number))
        # a generation goes on with padding where the trainer cuts; the last token was never an input
        assert store.find(ids[:4])[0, 0, 0] == number
        assert store.find(ids[:7])[0, 0, 0] == number
    assert store.find(ids[:9])[0, 0, 0] == 0


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_padding_is_known_behind_a_static_cache(name):
    model, prompts, mask = model_of(name), texts(2, 6), torch.ones(2, 6, dtype=torch.long)
    prompts[1, :2], mask[1, :2] = 0, 0
    inputs = {"input_ids": prompts, "attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4}
    with record_routing(model) as recorder:
        written = model.generate(**inputs, do_sample=False, cache_implementation="static", disable_compile=True)
    assert len(recorder.store.find(written[1, 2:])) == 7


@pytest.mark.parametrize("name", ["mixtral", "moe"])
def test_each_of_several_answers_to_a_prompt_is_recorded(name):
    model, prompts, mask = model_of(name), texts(2, 6), torch.ones(2, 6, dtype=torch.long)
    prompts[1, :2], mask[1, :2] = 0, 0
    fields = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    with record_routing(model) as recorder:
        written = model.generate(input_ids=prompts, attention_mask=mask, **fields)
    rows = [row[2 * (place > 2) :] for place, row in enumerate(written)]
    assert len({tuple(row.tolist()) for row in rows}) == len(recorder.store) == 6
    for row in rows:
        found = recorder.store.find(row)
        assert len(found) == len(row) - 1
        for layer, index in enumerate(chosen(model, input_ids=row[None])):
            assert sets_equal(found[:, layer], index[:-1])


def test_beam_search_is_refused_while_a_recorder_is_on_the_model():
    model, fields = model_of("mixtral"), {"input_ids": texts(2, 6), "max_new_tokens": 3, "num_beams": 2}
    wanted = model.generate(**fields)
    with record_routing(model):
        twin = copy.deepcopy(model)
        with pytest.raises(ValueError, match="generate with num_beams=1"):
            model.generate(**fields)
    assert torch.equal(model.generate(**fields), wanted)
    assert torch.equal(twin.generate(**fields), wanted)
    assert "_reorder_cache" not in vars(model)


def test_a_generation_from_embeddings_does_not_join_the_one_before():
    model, prompts = model_of("mixtral"), texts(2, 9)
    fields = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with record_routing(model) as recorder:
        written = model.generate(input_ids=prompts, **fields)
        model.generate(inputs_embeds=model.get_input_embeddings()(prompts[:, :4]), **fields)
    assert len(recorder.store) == 2
    assert all(len(recorder.store.find(row)) == 12 for row in written)


def test_packed_rows_are_recorded_as_single_texts():
    model, (one, two) = model_of("mixtral"), texts(2)
    with record_routing(model) as recorder, torch.no_grad():
        model(torch.cat([one, two])[None], position_ids=torch.arange(11).repeat(2)[None], use_cache=False)
    assert len(recorder.store) == 2
    assert len(recorder.store.find(two)) == 11


def test_a_second_replay_is_refused_and_an_interrupt_leaves_no_mode():
    model, ids = model_of("mixtral"), texts()
    with record_routing(model) as recorder, torch.no_grad():
        model(ids, use_cache=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    with replay_routing(model, recorder.store):
        with pytest.raises(ValueError, match="is replayed already"):
            replay_routing(model, recorder.store)
        handle = model.model.layers[0].mlp.gate.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, use_cache=False)
        handle.remove()
        model(ids, use_cache=False)
        assert torch._C._len_torch_function_stack() == 0
    replay_routing(model, recorder.store).remove()


def test_scores_of_a_pass_are_free_when_it_ends():
    model, ids = model_of("deepseek_v2"), texts()
    with record_routing(model) as recorder, torch.no_grad():
        model(ids, use_cache=False)
    gc.collect()
    gc.disable()
    try:
        with replay_routing(model, recorder.store), torch.no_grad():
            model(ids, use_cache=False)
        assert not any(isinstance(each, Selection) for each in gc.get_objects())
    finally:
        gc.enable()
