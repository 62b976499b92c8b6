"""This module tests what is loaded ahead of a layer, and that neither results nor routers nor random numbers change."""

import contextlib
import copy
import gc
import threading
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from modeling_moe import MoEForCausalLM, watch
from modeling_moe.monitoring import SparseLayer, sparse_layers
from modeling_moe.offload import prefetch
from modeling_moe.offload.prediction import NoPrediction, RouterTwin
from modeling_moe.offload.prefetch import Prefetcher
from modeling_moe.router_catalogue import ROUTERS
from tests.builders import tiny_config, tiny_model
from tests.monitoring.moe_families import experts_families, tiny_family


IDS = torch.arange(3, 39).view(2, 18)


class RecordingCache:
    """This stands in for a layer's expert cache, and notes what it is asked to load."""

    def __init__(self, slots: int, error: Exception | None = None):
        self.slots, self.asked, self.error = SimpleNamespace(experts=[None] * slots), [], error
        self.threads = set()

    def prefetch(self, experts):
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.asked.append(list(experts))


def caches_of(model: nn.Module, slots: int | None = None) -> dict[str, RecordingCache]:
    return {layer.name: RecordingCache(slots or layer.num_experts) for layer in sparse_layers(model)}


def wait_in_each_layer(model: nn.Module, prefetcher: Prefetcher) -> None:
    """Lets each layer wait until the thread has asked for the next layer's experts."""
    for layer in sparse_layers(model):
        layer.experts.register_forward_pre_hook(lambda *_: prefetcher.wait())


class Called(NamedTuple):
    """A call of a layer's experts: the input of the router, the experts used, and the number of experts of a token."""

    layer: SparseLayer
    states: torch.Tensor | None
    used: list[int]
    top_k: int


def routed(model: nn.Module, run) -> list[Called]:
    """Runs a model and returns the calls of its experts in order."""
    inputs, calls, handles = {}, [], []
    for layer in sparse_layers(model):

        def keep(module, args, output, own=layer):
            inputs[own.name] = args[0].clone()

        def note(module, args, kwargs, own=layer):
            index = next(v for v in (*args, *kwargs.values()) if not v.is_floating_point())
            used = sorted({i for i in index.flatten().tolist() if 0 <= i < own.num_experts})
            calls.append(Called(own, inputs.get(own.name), used, index.shape[-1]))

        if layer.router is not None:
            handles.append(layer.router.register_forward_hook(keep))
        handles.append(layer.experts.register_forward_pre_hook(note, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return calls


def chosen_by(layer: SparseLayer, states: torch.Tensor, top_k: int) -> list[int]:
    """Returns what the router itself chooses for the states: the ids in its output."""
    output = layer.router(states)
    index = next(v for v in output if isinstance(v, torch.Tensor) and not v.is_floating_point())
    assert index.shape[-1] == top_k
    return sorted({i for i in index.flatten().tolist() if 0 <= i < layer.num_experts})


def three_layers(**fields) -> MoEForCausalLM:
    """Returns a model of three sparse layers with 8 experts, 2 per token."""
    fields = {"num_experts": 8, "num_experts_per_tok": 2, "mlp_layer_types": ["sparse"] * 3} | fields
    return tiny_model(**fields).eval()


# families whose routers take hidden states alone, and whose output names the chosen experts
QUICK = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("family", QUICK)
def test_what_is_loaded_is_the_choice_of_the_next_router_for_this_layers_state(family):
    model = tiny_family(family)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        calls = routed(model, lambda: model(input_ids=IDS, use_cache=False))
        wanted = {
            after.layer.name: [chosen_by(after.layer, before.states, after.top_k)] for before, after in pairwise(calls)
        }
        caches = caches_of(model)
        prefetcher = Prefetcher(model, caches)
        wait_in_each_layer(model, prefetcher)
        logits = model(input_ids=IDS, use_cache=False).logits
    assert {name: cache.asked for name, cache in caches.items() if cache.asked} == wanted
    assert prefetcher.reasons == {}
    assert torch.equal(logits, expected)
    prefetcher.close()


# their routers get a selection bias as an argument
WITHOUT = {"afmoe", "hy_v3", "lfm2_moe", "minimax_m2"}
# the router of zaya reads the one before too, so that the prediction can differ
OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in sorted({*experts_families()} - {*QUICK})]


@pytest.mark.parametrize("family", [*QUICK, *OTHERS])
def test_a_twin_chooses_what_the_router_chose_from_the_same_states(family):
    model = tiny_family(family)
    with torch.no_grad():
        calls = routed(model, lambda: model(input_ids=IDS, use_cache=False))
    compared = 0
    for layer, states, used, top_k in calls:
        with contextlib.suppress(NoPrediction):
            predicted = RouterTwin(layer).predict(states, top_k, 0, layer.num_experts)
            compared += 1
            assert family == "zaya" or predicted == used, layer.name
    assert (compared == 0) == (family in WITHOUT)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*experts_families()} - {*QUICK}))
def test_every_family_computes_the_same_with_prefetch_and_says_why_a_layer_has_none(family):
    model = tiny_family(family)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False)[0]
        calls = routed(model, lambda: model(input_ids=IDS, use_cache=False))
        caches = caches_of(model)
        prefetcher = Prefetcher(model, caches)
        wait_in_each_layer(model, prefetcher)
        random, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert torch.equal(model(input_ids=IDS, use_cache=False)[0], expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for layer in (call.layer for call in calls[1:]):
        first_of_its_kind = layer.layer == calls[0].layer.layer
        assert first_of_its_kind or bool(caches[layer.name].asked) != (layer.name in prefetcher.reasons), layer.name
    prefetcher.close()


def test_generation_is_bitwise_equal_and_every_step_is_prefetched():
    model, prompt = three_layers(), torch.tensor([[5, 9, 11, 20]])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    expected = model.generate(prompt, do_sample=True, **settings)
    caches = caches_of(model)
    prefetcher = Prefetcher(model, caches)
    wait_in_each_layer(model, prefetcher)
    torch.manual_seed(3)
    found = model.generate(prompt, do_sample=True, **settings)
    prefetcher.close()
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(found.logits, expected.logits, strict=True))
    first, *others = caches.values()
    assert first.asked == []
    assert [len(cache.asked) for cache in others] == [8, 8]
    assert {name for cache in others for name in cache.threads} == {"expert prefetch"}


def test_precision_is_that_of_the_next_routers_choice_where_routers_are_equal_and_layers_change_little():
    model = three_layers()
    with torch.no_grad():
        for layer in model.model.layers:
            # small steps of the residual stream: each layer routes nearly the state of the one before
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.experts.down_proj.mul_(0.01)
            layer.mlp.gate.weight.copy_(model.model.layers[0].mlp.gate.weight)
    tokens = [torch.tensor([[token]]) for token in range(4, 64)]

    def run():
        with torch.no_grad():
            for token in tokens:
                model(token, use_cache=False)

    calls = routed(model, run)
    caches = caches_of(model)
    prefetcher = Prefetcher(model, caches)
    wait_in_each_layer(model, prefetcher)
    run()
    prefetcher.close()
    gate = model.model.layers[0].mlp.gate.weight
    right = loaded = 0
    for number, name in list(enumerate(caches))[1:]:
        states = [call.states for call in calls if call.layer.name == list(caches)[number - 1]]
        used = [call.used for call in calls if call.layer.name == name]
        oracle = [sorted((s @ gate.T).topk(2).indices.flatten().tolist()) for s in states]
        assert caches[name].asked == oracle
        right += sum(len({*a} & {*b}) for a, b in zip(caches[name].asked, used, strict=True))
        loaded += sum(map(len, caches[name].asked))
    assert loaded == 2 * 2 * len(tokens)
    assert right / loaded > 0.9


def test_extra_experts_are_the_next_ones_by_router_logit():
    model = three_layers()
    layer = sparse_layers(model)[1]
    states = torch.randn(1, 32)
    order = (states @ layer.router.weight.T).argsort(descending=True).flatten().tolist()
    twin = RouterTwin(layer)
    assert twin.predict(states, 2, 0, 8) == sorted(order[:2])
    assert twin.predict(states, 2, 3, 8) == [*sorted(order[:2]), *order[2:5]]
    assert twin.predict(states, 2, 3, 4) == [*sorted(order[:2]), *order[2:4]]
    assert sorted(twin.predict(states, 2, 100, 100)) == list(range(8))


def test_of_more_experts_than_slots_the_first_round_is_loaded():
    model = three_layers()
    layer = sparse_layers(model)[1]
    states = torch.randn(40, 32)
    chosen = sorted({*layer.router(states).index.flatten().tolist()})
    assert len(chosen) > 3
    assert RouterTwin(layer).predict(states, 2, 2, 3) == chosen[:3]


def test_a_router_that_returns_logits_alone_is_predicted_by_the_largest_ones():
    gate = nn.Linear(6, 4)
    layer = SparseLayer(0, "experts", nn.Identity(), 4, gate)
    states = torch.randn(1, 6)
    assert RouterTwin(layer).predict(states, 2, 0, 4) == sorted(gate(states).topk(2).indices.flatten().tolist())


def test_the_selection_bias_counts_and_stays():
    model = tiny_family("deepseek_v3")
    layer = sparse_layers(model)[-1]
    twin, states = RouterTwin(layer), torch.randn(3, model.config.hidden_size)
    bias = dict(layer.router.named_buffers())["e_score_correction_bias"]
    with torch.no_grad():
        # after the twin was made, as by a training between two generations
        bias.copy_(torch.linspace(0, 50, len(bias)))
    before = bias.clone()
    top_k = model.config.num_experts_per_tok
    assert twin.predict(states, top_k, 0, layer.num_experts) == chosen_by(layer, states, top_k)
    assert torch.equal(bias, before)


# what the routers of this package need beyond the defaults
FIELDS = {
    "hierarchical": {"num_experts": 6, "n_group": 2, "topk_group": 1},
    "base_layer": {"num_experts_per_tok": 1},
    "gshard": {"num_experts_per_tok": 2},
    "uniform": {"num_experts_per_tok": 5},
}
# routers that choose by token id
BY_ID = {"hash", "hash_scored"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router_type", sorted(set(ROUTERS) - {"soft_moe", "lory", "task", "mmoe"}))
def test_predicting_has_no_effect_on_any_router_of_this_package(router_type, training):
    config = tiny_config(
        router_type=router_type,
        router_jitter_noise=0.1 if "router_jitter_noise" in ROUTERS[router_type].reads else 0.0,
        allow_noncausal=True,
        **FIELDS.get(router_type, {}),
    )
    router = ROUTERS[router_type](config)
    router.init_weights(0.5)
    router.train(training)
    router.register_forward_hook(lambda *_: pytest.fail("a hook of the router ran"))
    layer = SparseLayer(0, "experts", nn.Identity(), config.num_experts, router, returns_routing=True)
    state, random = copy.deepcopy(router.state_dict()), torch.get_rng_state()
    attributes = {name: value for name, value in vars(router).items() if not name.startswith("_")}
    twin, states = RouterTwin(layer), torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    if router_type in BY_ID:
        with pytest.raises(NoPrediction, match="give input_ids"):
            twin.predict(states, config.num_experts_per_tok, 1, config.num_experts)
    else:
        predicted = twin.predict(states, config.num_experts_per_tok, 1, config.num_experts)
        assert len({*predicted}) == len(predicted) > 0
        assert all(0 <= e < config.num_experts for e in predicted)
    assert torch.equal(torch.get_rng_state(), random)
    assert router.training is training
    assert all(torch.equal(tensor, state[name]) for name, tensor in router.state_dict().items())
    assert {name: value for name, value in vars(router).items() if not name.startswith("_")} == attributes


def test_the_twin_shares_parameters_and_follows_their_changes():
    model = three_layers()
    layer = sparse_layers(model)[1]
    twin, states = RouterTwin(layer), torch.randn(1, 32)
    with torch.no_grad():
        layer.router.weight.neg_()
    assert twin.predict(states, 2, 0, 8) == chosen_by(layer, states, 2)


def test_a_watched_model_has_the_same_figures_with_prefetch():
    model = three_layers()
    with torch.no_grad(), watch(model) as routing:
        model(IDS)
        expected = routing.read(reset=True)
        prefetcher = Prefetcher(model, caches_of(model))
        wait_in_each_layer(model, prefetcher)
        model(IDS)
        found = routing.read()
    prefetcher.close()
    assert [layer.load.tolist() for layer in found.layers] == [layer.load.tolist() for layer in expected.layers]


def test_recorded_router_logits_are_those_of_the_routers_alone():
    model = tiny_family("mixtral")
    with torch.no_grad():
        expected = model(input_ids=IDS, output_router_logits=True).router_logits
        prefetcher = Prefetcher(model, caches_of(model))
        wait_in_each_layer(model, prefetcher)
        found = model(input_ids=IDS, output_router_logits=True).router_logits
    prefetcher.close()
    assert len(found) == len(expected) == model.config.num_hidden_layers
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_passes_that_record_gradients_get_no_prefetch():
    model = three_layers()
    caches = caches_of(model)
    prefetcher = Prefetcher(model, caches)
    wait_in_each_layer(model, prefetcher)
    model(IDS, labels=IDS).loss.backward()
    prefetcher.close()
    assert all(cache.asked == [] for cache in caches.values())


def test_autocast_reaches_the_thread():
    model = tiny_family("qwen3_moe")
    caches = caches_of(model)
    prefetcher = Prefetcher(model, caches)
    wait_in_each_layer(model, prefetcher)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS)
    prefetcher.close()
    assert prefetcher.reasons == {}
    assert any(cache.asked for cache in caches.values())


def test_layers_without_a_cache_get_no_prefetch():
    model = three_layers()
    caches = caches_of(model)
    last = list(caches)[-1]
    prefetcher = Prefetcher(model, {last: caches[last]})
    wait_in_each_layer(model, prefetcher)
    with torch.no_grad():
        model(IDS)
    prefetcher.close()
    assert [len(cache.asked) for cache in caches.values()] == [0, 0, 1]


def test_a_router_that_needs_more_than_states_gets_no_prefetch_and_one_line(monkeypatch):
    lines = []
    monkeypatch.setattr(prefetch.logger, "warning", lines.append)
    model = tiny_model(router_type="hash", mlp_layer_types=["sparse"] * 3).eval()
    expected = model(IDS).logits
    caches = caches_of(model)
    prefetcher = Prefetcher(model, caches)
    wait_in_each_layer(model, prefetcher)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)
    prefetcher.close()
    assert list(prefetcher.reasons) == list(caches)[1:]
    assert all(
        "the router cannot be called on hidden states alone" in reason for reason in prefetcher.reasons.values()
    )
    (line,) = lines
    assert line.startswith(
        f"{list(caches)[1]} gets no prefetch: the router cannot be called on hidden states alone (ValueError: "
    )
    assert all(cache.asked == [] for cache in caches.values())


def test_a_required_argument_is_named_when_the_prefetcher_is_made():
    class Gate(nn.Linear):
        def forward(self, hidden_states, bias):
            return super().forward(hidden_states) + bias

    layer = SparseLayer(0, "experts", nn.Identity(), 4, Gate(6, 4))
    with pytest.raises(NoPrediction, match="the router needs bias beside the hidden states"):
        RouterTwin(layer)
    with pytest.raises(NoPrediction, match="the model declares no router"):
        RouterTwin(SparseLayer(0, "experts", nn.Identity(), 4, None))


def test_an_error_of_a_cache_leaves_the_model_running_and_ends_the_prefetch_of_the_layer():
    model = three_layers()
    caches = caches_of(model)
    _, second, third = caches
    caches[second].error = OSError("disk gone")
    with torch.no_grad():
        expected = model(IDS).logits
        prefetcher = Prefetcher(model, caches)
        wait_in_each_layer(model, prefetcher)
        assert torch.equal(model(IDS).logits, expected)
        caches[second].error = None
        model(IDS)
    prefetcher.close()
    assert prefetcher.reasons == {second: "the experts cannot be loaded ahead (OSError: disk gone)"}
    assert caches[second].asked == []
    assert len(caches[third].asked) == 2


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "expert prefetch"]


def test_the_thread_ends_with_the_model():
    model = three_layers()
    Prefetcher(model, caches_of(model))
    with torch.no_grad():
        model(IDS)
    assert len(prefetch_threads()) == 1
    del model
    gc.collect()
    assert prefetch_threads() == []


def test_close_removes_all_hooks_and_the_thread():
    model = three_layers()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    prefetcher = Prefetcher(model, caches_of(model))
    with torch.no_grad():
        model(IDS)
    prefetcher.close()
    prefetcher.close()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert prefetch_threads() == []


def test_a_copy_of_the_model_has_no_prefetch():
    model = three_layers()
    caches = caches_of(model)
    prefetcher = Prefetcher(model, caches)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        prefetcher.wait()
        for cache in caches.values():
            cache.asked.clear()
        twin(IDS)
    prefetcher.wait()
    assert all(cache.asked == [] for cache in caches.values())
    with pytest.raises(TypeError, match="a Prefetcher cannot be copied or pickled"):
        copy.deepcopy(prefetcher)
    prefetcher.close()


def test_a_negative_number_of_extra_experts_is_refused():
    with pytest.raises(ValueError, match="extra is -1: the number of further experts to load must be at least 0"):
        Prefetcher(three_layers(), {}, extra=-1)
